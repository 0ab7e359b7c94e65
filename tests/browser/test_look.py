"""How the page looks, sounds and is used without a mouse."""

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Chat, Chats
from tests.browser.test_chat import CIRCLE, QUESTION
from tests.browser.test_safety import pretend
from tests.servers import Server

WIDE = (
    "| a long heading | another one | and more |\n|---|---|---|\n| 1 | 2 | 3 |\n\n```\n"
    + "x" * 300
    + "\n```\n\n"
    + "y" * 300
    + "\n\nhttps://long.example/"
    + "z" * 200
)
BRIGHTNESS = """() => {
    const canvas = document.createElement('canvas').getContext(
        '2d', { willReadFrequently: true });
    canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data[0];
}"""


def test_it_is_dark_where_the_system_is_or_where_it_is_told_to_be(
    chats: Chats, demo_server: Server
) -> None:
    chat = chats.new(color_scheme="dark").open(demo_server.url)
    assert chat.page.evaluate(BRIGHTNESS) < 60
    chat.page.emulate_media(color_scheme="light")
    assert chat.page.evaluate(BRIGHTNESS) > 220
    chat.button("Settings").click()
    chat.page.get_by_role("combobox", name="Appearance").select_option("dark")
    assert chat.page.evaluate(BRIGHTNESS) < 60
    chat.page.reload()
    assert chat.page.evaluate(BRIGHTNESS) < 60


def overflow(chat: Chat) -> Any:
    """Pixels that the page is wider than the window, and what sticks out."""
    return chat.page.evaluate("""() => [
        document.documentElement.scrollWidth - innerWidth,
        ...['#scroller', 'dialog', '#composer'].map((each) => {
            const node = document.querySelector(each);
            return node.scrollWidth - node.clientWidth;
        }),
    ]""")


def test_a_small_telephone_never_scrolls_sideways(chats: Chats, demo_server: Server) -> None:
    chat = chats.new(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True).open(
        demo_server.url
    )
    none = [0, 0, 0, 0]
    expect(chat.page.locator("#welcome")).to_be_visible()
    assert overflow(chat) == none
    pretend(chat, {"content": WIDE})
    chat.attach(CIRCLE, CIRCLE, CIRCLE, CIRCLE, CIRCLE)
    chat.draft.fill("w" * 200)
    expect(chat.page.locator("#cost")).to_contain_text("tiles")
    assert overflow(chat) == none
    chat.button("Send").tap()
    chat.wait_for_end()
    assert overflow(chat) == none
    code = chat.answer.locator("pre")  # scrolls by itself
    assert code.evaluate("node => { node.scrollLeft = 50; return node.scrollLeft; }") == 50
    chat.page.unroute("**/v1/chat/completions")
    chat.button("Settings").tap()
    assert overflow(chat) == none
    chat.button("Close").tap()
    chat.button("Conversations").tap()
    chat.button("New chat").tap()
    expect(chat.button("New chat")).to_be_hidden()
    chat.button("Locate the green diamond").tap()
    chat.wait_for_end()
    expect(chat.page.locator(".box")).to_be_visible()
    assert overflow(chat) == none


def test_everything_can_be_done_with_the_keyboard(chat: Chat) -> None:
    press = chat.page.keyboard.press
    press("Tab")
    expect(chat.page.get_by_role("link", name="Skip to the message")).to_be_focused()
    press("Enter")
    expect(chat.draft).to_be_focused()
    chat.page.keyboard.type("Hello!")
    press("Shift+Enter")
    chat.page.keyboard.type("Who are you?")
    expect(chat.draft).to_have_value("Hello!\nWho are you?")
    press("Enter")
    chat.wait_for_end()
    expect(chat.draft).to_be_focused()
    press("ArrowUp")
    field = chat.page.get_by_role("textbox", name="Edit the message")
    expect(field).to_be_focused()
    press("Escape")
    expect(field).to_have_count(0)
    expect(chat.button("Edit")).to_be_focused()
    press("Enter")
    expect(field).to_be_focused()
    press("ControlOrMeta+a")
    chat.page.keyboard.type("Thank you!")
    press("Enter")
    assert "welcome" in chat.wait_for_end()
    # Back to the answer's own buttons.
    for _ in range(6):
        press("Shift+Tab")
        if chat.page.evaluate("document.activeElement.title") == "Regenerate":
            break
    outline = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press("Enter")
    chat.wait_for_end()
    expect(chat.draft).to_be_focused()
    chat.button("Settings").focus()
    press("Enter")
    expect(chat.page.get_by_role("dialog", name="Settings")).to_be_visible()
    press("Escape")
    expect(chat.button("Settings")).to_be_focused()


def test_an_answer_is_read_out_once_and_not_word_by_word(chat: Chat) -> None:
    chat.page.evaluate("""() => {
        window.said = [];
        const live = document.querySelector('#live');
        new MutationObserver(() => window.said.push(live.textContent)).observe(
            live, { childList: true, characterData: true, subtree: true });
    }""")
    live = chat.page.locator("[aria-live], [role=status], [role=alert], [role=log]")
    expect(chat.page.locator("#log").locator(live)).to_have_count(0)
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    text = chat.wait_for_end()
    said = chat.page.evaluate("window.said")
    assert said == ["Attached: circle.png.", "Waiting for the answer.", f"Answer: {text}"]


INTERACTIVE = {"button", "textbox", "combobox", "spinbutton", "checkbox", "link", "dialog", "image"}


def test_everything_has_a_name_for_screen_readers(chat: Chat) -> None:
    chat.button("Locate the green diamond").click()
    chat.wait_for_end()
    chat.attach(CIRCLE)
    session = chat.page.context.new_cdp_session(chat.page)

    def nodes() -> list[tuple[str, str]]:
        tree = session.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in tree
            if not node["ignored"]
        ]

    page = nodes()
    chat.button("Settings").click()
    settings = nodes()
    session.detach()
    found = [(role, name) for role, name in page + settings if role in INTERACTIVE]
    assert len(found) > 30
    assert [role for role, name in found if not name] == []
    names = [name for role, name in page if role == "button"]
    assert {"Send", "Locate", "New chat", "Regenerate", "Remove circle.png"} <= set(names)
    assert ("heading", "Answer") in page
    assert ("main", "") in page
    assert any(role == "dialog" and name == "Settings" for role, name in settings)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(
    chats: Chats, demo_server: Server, scheme: Any
) -> None:
    """At least 4.5 to 1, as the web's guidelines for accessibility want it."""
    chat = chats.new(color_scheme=scheme).open(demo_server.url)
    ratios = chat.page.evaluate("""() => {
        const canvas = document.createElement('canvas').getContext(
            '2d', { willReadFrequently: true });
        const probe = document.body.appendChild(document.createElement('i'));
        const light = (name) => {
            probe.style.color = `var(${name})`;
            canvas.fillStyle = getComputedStyle(probe).color;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const pairs = [['ink', 'paper'], ['ink', 'panel'], ['ink', 'field'], ['ink', 'bubble'],
            ['dim', 'paper'], ['dim', 'panel'], ['dim', 'field'], ['mark', 'paper'],
            ['mark', 'panel'], ['mark', 'bubble'], ['on-mark', 'mark'],
            ['wrong', 'field'], ['wrong', 'wrong-paper']];
        const found = Object.fromEntries(pairs.map(([front, back]) => {
            const [a, b] = [light(`--${front}`), light(`--${back}`)].sort((x, y) => y - x);
            return [`${front} on ${back}`, (a + 0.05) / (b + 0.05)];
        }));
        probe.remove();
        return found;
    }""")
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}


def test_nothing_moves_for_those_who_asked_for_that(chats: Chats, demo_server: Server) -> None:
    chat = chats.new(reduced_motion="reduce").open(demo_server.url)
    side = chat.page.locator("#side")
    assert side.evaluate("node => getComputedStyle(node).transitionDuration") == "0s"
    chat.page.emulate_media(reduced_motion="no-preference")
    assert side.evaluate("node => getComputedStyle(node).transitionDuration") != "0s"


def test_a_browser_without_room_says_so_and_the_page_goes_on(chat: Chat) -> None:
    session = chat.page.context.new_cdp_session(chat.page)
    origin = re.match(r"https?://[^/]+", chat.page.url)
    assert origin
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin[0], "quotaSize": 1})
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    assert "red circle" in chat.wait_for_end()
    expect(chat.page.locator("#notice")).to_contain_text("no room to keep this conversation")
    session.detach()
