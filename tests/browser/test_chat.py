"""What somebody does with the page, with the demo model behind it."""

import json
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests import clips
from tests.browser.conftest import Chat, Chats
from tests.servers import Server, draw, encode

QUESTION = "What is in this picture?"
CIRCLE = ("circle.png", "image/png", encode(draw("red", "circle")))
AXES = (("x", "width"), ("y", "height"))
SQUARE = ("square.png", "image/png", encode(draw("blue", "square", (300, 200))))


def test_a_picture_is_sent_and_its_answer_streams_in(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    assert "red circle" in chat.wait_for_end()
    shown = chat.page.locator("article.user img")
    expect(shown).to_have_attribute("alt", "circle.png")
    assert shown.evaluate("image => image.naturalWidth") == 112
    expect(chat.draft).to_have_value("")
    expect(chat.draft).to_be_focused()
    # Below it: prompt and answer, tiles, and the time to the first token.
    said = r"^\d+ \+ 5 tokens · 1 tile( · \d+ cached)? · first after [\d.]+ s$"
    expect(chat.answers.locator(".stats")).to_have_text(re.compile(said))


def test_a_conversation_goes_on_and_knows_its_earlier_pictures(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    chat.wait_for_end()
    chat.send("What colour is it?")
    assert "red" in chat.wait_for_end(2)


def test_an_example_works_with_one_click_and_its_box_lies_on_the_thing(chat: Chat) -> None:
    chat.button("Locate the green diamond").click()
    chat.wait_for_end()
    expect(chat.page.get_by_role("list", name="Found, in pixels")).to_contain_text("green diamond")
    frame = chat.page.locator(".frame")
    expect(frame.locator(".box")).to_have_text("green diamond")
    picture, box = frame.locator("img").bounding_box(), frame.locator(".box").bounding_box()
    assert picture
    assert box
    x, y = ((box[at] + box[size] / 2 - picture[at]) / picture[size] for at, size in AXES)
    # The picture has the diamond's centre at (318, 121) of 480 x 320, its radius is 62.
    assert abs(x - 318 / 480) < 0.06
    assert abs(y - 121 / 320) < 0.06
    assert 0.2 < box["width"] / picture["width"] < 0.32
    assert chat.answer.inner_text() == ""  # label and numbers are in the list
    assert not chat.page.locator("#welcome").is_visible()


def test_what_is_asked_for_by_locate_is_the_form_that_the_model_was_taught(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.button("Locate").click()
    expect(chat.button("Locate")).to_have_attribute("aria-pressed", "true")
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.send("red circle")
    (message,) = asked.value.post_data_json["messages"]
    assert message["content"][1]["text"].endswith("describes: <ref>red circle</ref>")
    chat.wait_for_end()
    expect(chat.page.locator(".box")).to_have_count(1)


def test_what_it_would_cost_is_what_it_costs(chat: Chat) -> None:
    chat.draft.fill("Which picture shows a circle?")  # first: what has tiles counts it too
    chat.attach(CIRCLE, SQUARE)
    cost = chat.page.locator("#cost")
    expect(cost).to_have_text(re.compile(r"^[\d,]+ of 4,096 tokens · 8 tiles$"))
    tiles = chat.page.locator("#attached .cost")
    expect(tiles).to_have_text(["1 tile", "7 tiles"])
    told = cost.inner_text().split(" ")[0]
    chat.draft.press("Enter")
    chat.wait_for_end()
    stats = chat.answers.locator(".stats").inner_text()
    assert stats.startswith(f"{told} + ")
    assert " · 8 tiles" in stats


def test_what_does_not_fit_or_cannot_be_read_is_told_before_it_is_sent(chat: Chat) -> None:
    cost = chat.page.locator("#cost")
    chat.draft.fill("word " * 5000)
    expect(cost).to_contain_text("it does not fit")
    expect(cost).to_have_class("wrong")
    chat.draft.fill("What is it?")
    expect(cost).to_have_text(re.compile(r"^\d+ of 4,096 tokens$"))
    chat.forgive(r"status of 400")
    chat.attach(("broken.png", "image/png", b"\x89PNG\r\n\x1a\n of nothing"))
    expect(cost).to_have_text("broken.png: The picture is damaged or truncated.")
    expect(chat.page.locator("#live")).to_have_text(cost.inner_text())
    expect(chat.page.locator("#attached .file")).to_have_text("PNG")
    chat.button("Remove broken.png").click()
    expect(cost).to_have_text(re.compile(r"^\d+ of 4,096 tokens$"))


def test_what_is_too_large_for_a_request_is_not_taken(chats: Chats, demo_server: Server) -> None:
    chat = chats.new()
    info = httpx.get(demo_server.url + "/server_info", timeout=60).json()
    info["settings"]["max_request_bytes"] = 3 << 20
    chat.page.route("**/server_info", lambda route: route.fulfill(json=info))
    with chat.page.expect_response("**/server_info"):
        chat.open(demo_server.url)
    for name in ("one.png", "two.png"):
        chat.attach((name, "image/png", CIRCLE[2] + bytes(3 << 19)))
    expect(chat.page.locator("#notice")).to_contain_text(
        "two.png is too large: a request with everything in it may have 3 MiB."
    )
    expect(chat.page.locator("#attached li")).to_have_count(1)


def test_a_heavy_picture_is_not_sent_again_for_each_word(chat: Chat) -> None:
    cost = chat.page.locator("#cost")
    chat.attach(("heavy.png", "image/png", CIRCLE[2] + bytes(4 << 20)))
    expect(cost).to_have_text(re.compile(r"^\d+ of 4,096 tokens · 1 tile$"))
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    chat.draft.press_sequentially(QUESTION)
    expect(cost).to_have_text(re.compile(r"^about \d+ of 4,096 tokens · 1 tile$"))
    chat.draft.press("Enter")
    assert "red circle" in chat.wait_for_end()
    assert [url.rsplit("/", 1)[1] for url in asked if "/v1/" in url] == ["completions"]


def test_pictures_come_by_drop_and_paste_too_and_go_again(chat: Chat) -> None:
    give = """([kind, name, type, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type }));
        if (kind === 'paste') {
            document.querySelector('#draft').dispatchEvent(new ClipboardEvent(
                'paste', { clipboardData: data, bubbles: true, cancelable: true }));
            return;
        }
        for (const each of ['dragover', 'drop']) {
            document.body.dispatchEvent(
                new DragEvent(each, { dataTransfer: data, bubbles: true, cancelable: true }));
        }
    }"""
    for kind, (name, mime, data) in (("drop", CIRCLE), ("paste", SQUARE)):
        chat.page.evaluate(give, [kind, name, mime, list(data)])
    pictures = chat.page.get_by_role("list", name="Attached").get_by_role("img")
    expect(pictures).to_have_count(2)
    chat.page.evaluate(give, ["drop", "notes.txt", "text/plain", [65]])
    expect(chat.page.get_by_role("status").first).to_have_text(
        re.compile("notes.txt is neither a picture nor a video")
    )
    expect(pictures).to_have_count(2)
    chat.button("Remove square.png").click()
    expect(pictures).to_have_count(1)
    chat.send(QUESTION)
    assert "red circle" in chat.wait_for_end()


def test_a_video_is_shown_and_answered(chat: Chat, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    clips.encode(video, ["-c:v", "libx264", "-pix_fmt", "yuv420p"], count=8)
    chat.attach(str(video))
    chat.draft.fill("What do you see?")
    expect(chat.page.locator("#attached .cost")).to_have_text("8 fr · 8 tiles")
    chat.draft.press("Enter")
    assert chat.wait_for_end()
    expect(chat.page.locator("article.user .shown")).to_be_visible()


def test_an_answer_is_written_anew(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    first = chat.wait_for_end()
    chat.set(system="Answer in one word.", seed=7)
    with chat.page.expect_request("**/chat/completions") as asked:
        chat.button("Regenerate").click()
    body = asked.value.post_data_json
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["seed"] == 7
    assert chat.wait_for_end(1)
    assert first
    expect(chat.page.locator("article")).to_have_count(2)


def test_an_edited_question_keeps_its_picture_and_drops_what_came_behind(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    chat.wait_for_end()
    chat.send("What colour is it?")
    chat.wait_for_end(2)
    chat.page.locator("article.user").first.hover()
    chat.page.locator("article.user").first.get_by_role("button", name="Edit").click()
    field = chat.page.get_by_role("textbox", name="Edit the message")
    expect(field).to_be_focused()
    expect(field).to_have_value(QUESTION)
    field.fill("Is there a blue square in the picture?")
    with chat.page.expect_request("**/chat/completions") as asked:
        field.press("Enter")
    (message,) = asked.value.post_data_json["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert "No" in chat.wait_for_end(1)
    expect(chat.page.locator("article")).to_have_count(2)


def test_conversations_are_kept_with_their_pictures_and_can_be_deleted(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    text = chat.wait_for_end()
    chat.button("New chat").click()
    expect(chat.page.locator("#welcome")).to_be_visible()
    chat.send("Hello!")
    chat.wait_for_end()
    kept = chat.page.locator("#chats li")
    expect(kept).to_have_count(2)
    chat.page.reload()
    expect(chat.page.locator("article.user .text")).to_have_text("Hello!")
    chat.button(QUESTION).click()
    expect(chat.answer).to_have_text(text)
    expect(chat.page.locator("article.user img")).to_have_js_property("naturalWidth", 112)
    chat.send("What colour is it?")
    assert "red" in chat.wait_for_end(2)
    chat.page.locator("#chats li", has_text=QUESTION).hover()
    chat.button(f"Delete {QUESTION}").click()
    expect(kept).to_have_count(1)
    expect(chat.page.locator("#welcome")).to_be_visible()
    chat.page.reload()
    expect(kept).to_have_count(1)


def test_an_exported_conversation_is_a_request_that_can_be_sent(
    chat: Chat, demo_server: Server
) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    chat.wait_for_end()
    with chat.page.expect_download() as download:
        chat.button("Export the conversation").click()
    body = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
    messages = [*body["messages"], {"role": "user", "content": "What colour is it?"}]
    with demo_server.client() as client:
        answer = client.chat.completions.create(**{**body, "messages": messages})
    assert "red" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("secure", [True, False])
def test_a_conversation_is_copied_as_text(chats: Chats, demo_server: Server, secure: bool) -> None:
    """Browsers give the clipboard to pages of https and of this machine only."""
    chat = chats.new(permissions=["clipboard-read", "clipboard-write"]).open(demo_server.url)
    chat.send("Hello!")
    text = chat.wait_for_end()
    chat.page.evaluate("navigator.clipboard.writeText('something else')")
    if not secure:
        chat.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    chat.button("Copy the conversation").click()
    expect(chat.page.locator("#live")).to_have_text("Copied.")
    copied = chat.page.evaluate("navigator.clipboard.readText()")
    assert copied == f"**You**\n\nHello!\n\n**Answer**\n\n{text}"


def test_what_the_server_refuses_is_told_in_its_words_and_can_be_tried_again(chat: Chat) -> None:
    chat.forgive(r"status of 400")
    chat.set(more='{"temperature": 9}')
    chat.send("Hello!")
    error = chat.answers.locator(".error")
    expect(error).to_contain_text("temperature must be at most 2.")
    expect(error.locator("code")).to_have_text("invalid_value")
    chat.set(more="{no json")
    chat.button("Try again").click()
    expect(error).to_contain_text("no JSON object")
    chat.set(more='{"min_p": 0.1}')
    chat.button("Try again").click()
    assert chat.wait_for_end().startswith("Hello!")
    expect(error).to_have_count(0)


def test_a_cut_off_answer_says_so(chat: Chat) -> None:
    chat.set(max_completion_tokens=3)
    chat.send("Hello!")
    chat.wait_for_end()
    expect(chat.answers.locator(".note")).to_contain_text("Cut off")
