"""The chat page in Debian's Chromium. Every test also requires that nothing was written to the
console, nothing failed in the page, and nothing offended its content security policy."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.servers import Server
from tests.tools import tool

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
]
PATIENCE = 60_000  # milliseconds; the machine may be busy

# A violation is no console message in every case, so that the page itself has to tell.
WATCH = """
addEventListener('securitypolicyviolation', (event) => {
  console.error(`CSP: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`);
});
"""


# Not for the session: while it is there, an event loop runs, and asynchronous tests need their own.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    executable = tool("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@dataclasses.dataclass
class Chat:
    """The page, and where in it things are."""

    page: Page
    complaints: list[str]
    forgiven: str = "(?!)"

    def complain(self, text: str) -> None:
        if not re.search(self.forgiven, text):
            self.complaints.append(text)

    def forgive(self, pattern: str) -> None:
        """Browsers write failed requests to the console: from here on those of ``pattern`` may."""
        self.forgiven = pattern

    def open(self, url: str) -> "Chat":
        self.page.goto(url + "/")
        return self

    @property
    def draft(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.answer")

    @property
    def answer(self) -> Locator:
        """The text of the last one."""
        return self.answers.last.locator(".text")

    def button(self, name: str | re.Pattern[str]) -> Locator:
        return self.page.get_by_role("button", name=name, exact=isinstance(name, str))

    def attach(self, *files: Any) -> None:
        """Files by the picker: paths, or names with their bytes."""
        given = [
            each
            if not isinstance(each, tuple)
            else {"name": each[0], "mimeType": each[1], "buffer": each[2]}
            for each in files
        ]
        self.page.locator("#files").set_input_files(given)

    def send(self, text: str) -> None:
        self.draft.fill(text)
        self.draft.press("Enter")

    def wait_for_end(self, number: int = 1) -> str:
        """The text of the answer of this number, when all of it is there."""
        expect(self.answers).to_have_count(number)
        expect(self.answers.last).to_have_attribute("aria-busy", "false")
        return self.answer.inner_text()

    def set(self, **settings: Any) -> None:
        """Fill in fields of the settings."""
        self.button("Settings").click()
        for name, value in settings.items():
            self.page.locator(f"[data-setting={name}]").fill(str(value))
        self.button("Done").click()


class Chats:
    """Opens pages, each in a browser of its own that knows nothing of the others."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.chats: list[Chat] = []
        self.contexts: list[BrowserContext] = []

    def new(self, **options: Any) -> Chat:
        options = {"viewport": {"width": 1280, "height": 800}} | options
        context = self._browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        context.add_init_script(WATCH)
        self.contexts.append(context)
        return self.page_of(context)

    def page_of(self, context: BrowserContext) -> Chat:
        chat = Chat(context.new_page(), [])
        chat.page.on("console", lambda message: chat.complain(message.text))
        chat.page.on("pageerror", lambda error: chat.complain(str(error)))
        self.chats.append(chat)
        return chat

    def close(self) -> None:
        for context in self.contexts:
            context.close()


@pytest.fixture
def chats(chromium: Browser) -> Iterator[Chats]:
    expect.set_options(timeout=PATIENCE)
    opened = Chats(chromium)
    yield opened
    opened.close()
    assert [each.complaints for each in opened.chats if each.complaints] == []


@pytest.fixture
def chat(chats: Chats, demo_server: Server) -> Chat:
    """The page of the demo model."""
    return chats.new().open(demo_server.url)
