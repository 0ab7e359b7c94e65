"""What somebody does with the page, with the demo model behind it."""

from playwright.sync_api import expect

from tests.browser.conftest import Chat
from tests.servers import draw, encode

QUESTION = "What is in this picture?"
CIRCLE = ("circle.png", "image/png", encode(draw("red", "circle")))
SQUARE = ("square.png", "image/png", encode(draw("blue", "square")))


def test_a_picture_is_sent_and_its_answer_streams_in(chat: Chat) -> None:
    chat.attach(CIRCLE)
    chat.send(QUESTION)
    assert "red circle" in chat.wait_for_end()
    shown = chat.page.locator("article.user img")
    expect(shown).to_have_attribute("alt", "circle.png")
    assert shown.evaluate("image => image.naturalWidth") == 112
    expect(chat.draft).to_have_value("")
    expect(chat.draft).to_be_focused()
