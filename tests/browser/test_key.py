"""A server that wants an API key, and that a proxy may offer under a path."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Chat, Chats
from tests.servers import Server


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("server") / "log.txt",
        ["--api-key", "secret-key", "--root-path", "/vision"],
    )
    yield server
    server.close()


def give_key(chat: Chat, key: str) -> None:
    field = chat.page.get_by_role("textbox", name="API key")
    expect(field).to_be_focused()
    field.fill(key)
    field.press("Enter")


def test_the_page_asks_for_a_key_and_keeps_it_as_long_as_it_was_told(
    chats: Chats, keyed: Server
) -> None:
    chat = chats.new()
    chat.forgive("status of 401")
    chat.open(keyed.url)
    told = chat.page.get_by_role("alert")
    expect(told).to_contain_text("An API key is needed.")
    give_key(chat, "wrong")
    expect(told).to_contain_text("The API key is wrong.")
    give_key(chat, "secret-key")
    expect(chat.page.get_by_role("combobox", name="Model")).to_have_value("internvl-demo")
    expect(chat.page.get_by_role("dialog")).to_have_count(0)
    chat.send("Hello!")
    assert chat.wait_for_end().startswith("Hello!")
    chat.page.reload()  # the same tab
    expect(chat.page.get_by_role("combobox", name="Model")).to_have_value("internvl-demo")

    other = chats.page_of(chat.page.context)
    other.forgive("status of 401")
    other.open(keyed.url)
    expect(other.page.get_by_role("alert")).to_contain_text("An API key is needed.")
    other.page.get_by_role("checkbox", name="Remember").check()
    other.page.get_by_role("textbox", name="API key").focus()
    give_key(other, "secret-key")
    expect(other.page.get_by_role("combobox", name="Model")).to_have_value("internvl-demo")

    third = chats.page_of(chat.page.context).open(keyed.url)
    expect(third.page.get_by_role("combobox", name="Model")).to_have_value("internvl-demo")


@pytest.mark.parametrize("path", ["", "/vision"])
def test_a_question_that_lacked_a_key_is_asked_again_with_it(
    chats: Chats, keyed: Server, path: str
) -> None:
    chat = chats.new()
    chat.forgive("status of 401")
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    chat.open(keyed.url + path)
    expect(chat.page.get_by_role("dialog")).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("dialog")).to_be_hidden()
    chat.send("Hello!")
    expect(chat.answers.locator(".error")).to_contain_text("An API key is needed.")
    give_key(chat, "secret-key")
    expect(chat.answers.locator(".error")).to_have_count(0)  # it is asked again
    assert chat.wait_for_end().startswith("Hello!")
    named = [url for url in asked if not url.startswith(("data:", "blob:"))]
    assert all(url.startswith(f"{keyed.url}{path}/") for url in named)
