"""What answers are written on: plain text for pipes and files, Markdown for a terminal."""

import os
import sys
from collections.abc import Iterator
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from server.terminal import plain

_FENCES = ("```", "~~~")


class Paper(Protocol):
    """``write`` the pieces of an answer, then ``end`` it; ``note`` is for what is no answer."""

    def write(self, text: str) -> None: ...

    def end(self) -> None: ...

    def note(self, text: str) -> None: ...


def paper() -> Paper:
    """As fits where standard output leads."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return Page()
    return Strip()


class Strip:
    """Text as it comes; notes are for people."""

    def write(self, text: str) -> None:
        """See Paper."""
        sys.stdout.write(plain(text))
        sys.stdout.flush()

    def end(self) -> None:
        """See Paper."""
        self.write("\n")

    def note(self, text: str) -> None:
        """See Paper."""
        if sys.stdout.isatty():
            sys.stdout.write(f"{text}\n")


class Page:
    """Blocks of Markdown, such as paragraphs: those that are over stand, and the last one is drawn
    again as it grows."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._text = ""

    def write(self, text: str) -> None:
        """See Paper."""
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        over, self._text = split(self._text + text)
        self._live.update(_Block(self._text))
        if over:
            self._console.print(_Block(over))
            self._console.print()

    def end(self) -> None:
        """See Paper."""
        if self._live is not None:
            self._live.update(Text())
            self._live.stop()
        if self._text.strip():
            self._console.print(_Block(self._text))
        self._live, self._text = None, ""

    def note(self, text: str) -> None:
        """See Paper."""
        self._console.print(Text(text, style="dim"))


class _Block:
    """Markdown. What it is made of was written by the model, and entities in it are read only now:
    so it is what is drawn that is made safe."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        # Read only when it is drawn, a few times a second: answers grow token by token.
        markdown = Markdown("", hyperlinks=False)  # they may hide where they lead
        # Marks of places, <box> and <ref>, are text.
        parser = MarkdownIt(options_update={"html": False}).enable(["strikethrough", "table"])
        markdown.parsed = parser.parse(self._text)
        for segment in console.render(markdown, options):
            if segment.control is None:
                yield Segment(plain(segment.text), segment.style)


def split(text: str) -> tuple[str, str]:
    """The blocks that nothing can be added to, and the rest: blocks end with an empty line, but not
    in code, nor before an indented line, which may belong to a list."""
    at = end = 0
    fence = ""
    is_empty = False
    for line in text.splitlines(keepends=True):
        mark = line.lstrip()[:3]
        if is_empty and not fence and not line[0].isspace():
            end = at
        is_empty = not line.strip()
        if mark in _FENCES and fence in ("", mark):
            fence = "" if fence else mark
        at += len(line)
    return text[:end].strip("\n"), text[end:]
