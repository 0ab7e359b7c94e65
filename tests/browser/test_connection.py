"""Answers that are stopped, and connections that break."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from server.routes.web import VERSION
from tests.browser.cable import Cable
from tests.browser.conftest import Chat, Chats
from tests.servers import Server

LONG = '{"ignore_eos": true}'
RUNNING = "internvl_num_requests_running"
ABORTED = 'internvl_request_success_total{finished_reason="abort"}'


@pytest.fixture
def cable(demo_server: Server) -> Iterator[Cable]:
    with Cable(demo_server.port) as cable:
        yield cable


@pytest.fixture
def chat(cable: Cable, chats: Chats) -> Chat:
    """A page at the end of the cable, which is there for longer than the page."""
    return chats.new().open(cable.url)


def ask_and_hold(chat: Chat, cable: Cable, tokens: int) -> None:
    """Ask for a long answer; it is held up behind its first words."""
    hold(chat, cable, tokens)
    has_begun(chat)


def hold(chat: Chat, cable: Cable, tokens: int) -> None:
    chat.set(max_completion_tokens=tokens, more=LONG)
    cable.hold_after(6)
    chat.send("Hello!")
    assert cable.held.wait(60)


def has_begun(chat: Chat) -> None:
    expect(chat.answer).to_contain_text("Hello! Show")
    expect(chat.page.locator("#chats li")).to_have_count(1)


def whole(server: Server, tokens: int) -> str:
    return server.ask("Hello!", max_tokens=tokens, extra_body={"ignore_eos": True})


def test_an_answer_goes_on_where_its_connection_broke(
    chat: Chat, cable: Cable, demo_server: Server
) -> None:
    ask_and_hold(chat, cable, 60)
    chat.forgive("ERR_")
    before = demo_server.metric("internvl_streams_resumed_total")
    cable.cut()
    expect(chat.answers.locator(".note")).to_contain_text("Reconnecting")
    cable.mend()
    text = chat.wait_for_end()
    assert text.split() == whole(demo_server, 60).split()
    assert demo_server.metric("internvl_streams_resumed_total") == (before or 0) + 1
    expect(chat.answers.locator(".note")).not_to_contain_text("Reconnecting")


def test_an_answer_goes_on_after_the_page_was_reloaded(
    chat: Chat, cable: Cable, demo_server: Server
) -> None:
    ask_and_hold(chat, cable, 60)
    # What is kept of the answer may be older or newer than what the page has shown.
    chat.page.evaluate("""async () => {
        const done = (request) => new Promise((resolve) => { request.onsuccess = resolve; });
        const opening = indexedDB.open((await indexedDB.databases())[0].name);
        await done(opening);
        const chats = opening.result.transaction('chats', 'readwrite').objectStore('chats');
        const all = chats.getAll();
        await done(all);
        all.result[0].messages[1].text = 'Hello! Show me a';
        await done(chats.put(all.result[0]));
        opening.result.close();
    }""")
    chat.page.reload()
    expect(chat.page.locator("article.user .text")).to_have_text("Hello!")
    text = chat.wait_for_end()
    assert text.split() == whole(demo_server, 60).split()


@pytest.mark.parametrize("how", ["button", "Escape", "after a reload"])
def test_stopping_ends_the_work_at_once_and_keeps_what_is_there(
    chat: Chat, cable: Cable, demo_server: Server, how: str
) -> None:
    before = demo_server.metric(ABORTED) or 0
    hold(chat, cable, 3000)
    with demo_server.paused():
        has_begun(chat)
        assert demo_server.metric(RUNNING) == 1
        if how == "after a reload":
            chat.page.reload()
            expect(chat.answer).to_contain_text("Hello! Show")  # or there would be nothing to keep
        if how == "Escape":
            chat.page.keyboard.press("Escape")
        else:
            chat.button("Stop").click()
        chat.wait_for_end()
        expect(chat.answers.locator(".note")).to_have_text("Stopped.")
        expect(chat.answer).to_contain_text("Hello! Show")
        # Without a word to the server it would wait for its reader.
        demo_server.wait_for_metric(ABORTED, before + 1, deadline=20)
    demo_server.wait_for_metric(RUNNING, 0)
    expect(chat.button("Send")).to_be_visible()
    chat.set(more="")
    chat.send("Thank you!")
    assert chat.wait_for_end(2)


def test_an_answer_that_was_left_alone_too_long_can_be_asked_for_again(
    chat: Chat, cable: Cable
) -> None:
    ask_and_hold(chat, cable, 60)
    chat.forgive("ERR_|status of 404")
    gone = '{"error": {"message": "There is no such stream.", "code": "not_found"}}'
    chat.page.route("**/events", lambda route: route.fulfill(status=404, body=gone))
    cable.cut()
    cable.mend()
    expect(chat.answers.locator(".error")).to_contain_text("is no longer there")
    expect(chat.answer).to_contain_text("Hello! Show")
    chat.page.unroute("**/events")
    chat.button("Try again").click()
    assert len(chat.wait_for_end()) > 60


def test_a_server_that_is_away_is_told_and_found_again(chat: Chat, cable: Cable) -> None:
    expect(chat.page.get_by_role("combobox", name="Model")).to_have_value("internvl-demo")
    chat.forgive("ERR_")
    cable.cut()
    chat.send("Hello!")
    expect(chat.answers.locator(".error")).to_contain_text("The server cannot be reached.")
    cable.mend()
    chat.button("Try again").click()
    assert chat.wait_for_end().startswith("Hello!")


def test_an_answer_goes_on_while_another_conversation_is_looked_at(
    chat: Chat, cable: Cable, demo_server: Server
) -> None:
    ask_and_hold(chat, cable, 60)
    chat.forgive("ERR_")
    chat.button("New chat").click()
    expect(chat.page.locator("article")).to_have_count(0)
    with chat.page.expect_event("requestfinished", lambda each: each.url.endswith("/events")):
        cable.cut()
        cable.mend()
    expect(chat.page.locator("#welcome")).to_be_visible()
    expect(chat.button("Send")).to_be_visible()
    chat.button("Hello!").click()
    text = chat.wait_for_end()
    assert text.split() == whole(demo_server, 60).split()
    expect(chat.answers.locator(".stats")).to_have_text(re.compile(r" s · [\d,]+ tokens/s$"))


STREAM = (
    ': a comment\r\n\r\nid: 1\ndata: {"a": "é漢😀"}\n\nid:2\rdata:two\rdata: lines\r\r'
    "event: other\ndata\n\nid: 3\r\ndata:  x: y\r\n\r\ndata: not ended"
)


def test_events_are_the_same_wherever_the_network_cuts_them(chat: Chat) -> None:
    found = chat.page.evaluate(
        """async ([module, text]) => {
            const { events } = await import(new URL(module, document.baseURI));
            const bytes = new TextEncoder().encode(text);
            const found = new Set();
            for (let size = 1; size <= bytes.length; size += 1) {
                const body = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) {
                            controller.enqueue(bytes.slice(at, at + size));
                        }
                        controller.close();
                    },
                });
                const all = [];
                for await (const { id, data } of events(body)) all.push([id ?? null, data]);
                found.add(JSON.stringify(all));
            }
            return [...found].map(JSON.parse);
        }""",
        [f"web/{VERSION}/api.js", STREAM],
    )
    assert found == [
        [["1", '{"a": "é漢😀"}'], ["2", "two\nlines"], [None, ""], ["3", " x: y"]],
    ]
