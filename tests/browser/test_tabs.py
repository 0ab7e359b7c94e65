"""The same conversation in two tabs."""

from playwright.sync_api import expect

from tests.browser.conftest import Chat, Chats
from tests.servers import Server


def test_two_tabs_with_one_conversation_lose_nothing_of_it(
    chats: Chats, chat: Chat, demo_server: Server
) -> None:
    chat.send("Hello!")
    chat.wait_for_end()
    other = chats.page_of(chat.page.context).open(demo_server.url)
    other.page.bring_to_front()
    other.button("Hello!").click()
    other.wait_for_end()
    other.send("From the other tab?")
    other.wait_for_end(2)
    chat.page.bring_to_front()
    expect(chat.answers).to_have_count(2)
    chat.send("From the first tab?")
    chat.wait_for_end(3)
    chat.page.reload()
    expect(chat.page.locator("article.user")).to_contain_text(
        ["Hello!", "From the other tab?", "From the first tab?"]
    )
