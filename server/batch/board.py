"""How a batch goes, on standard error: a bar on a terminal, else a line from time to time."""

import sys
import time
from typing import TYPE_CHECKING

from wire.logs import say

if TYPE_CHECKING:
    from rich.progress import Progress

_INTERVAL = 10.0  # of lines where there is no terminal


class Board:
    """From ``start``, when the server is there, to ``close``. ``total`` are the bytes of the input;
    None where nobody knows."""

    def __init__(self, total: int | None) -> None:
        self.answered = self.failed = self.skipped = self.tokens = 0
        self.began = time.monotonic()
        self._told = self.began
        self._total, self._bytes = total, 0
        self._bar: Progress | None = None

    def start(self) -> None:
        """Count from now on."""
        self.began = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar(self._total)

    def skip(self, size: int) -> None:
        """A line is there from an earlier run."""
        self.skipped += 1
        if self._total is not None:
            self._total -= size  # so that the rate, and what is left, are those of this run

    def done(self, size: int, tokens: int, *, failed: bool) -> None:
        """A line is written."""
        self.failed += failed
        self.answered += not failed
        self.tokens += tokens
        self._bytes += size
        if self._bar is not None:
            (task,) = self._bar.task_ids
            self._bar.update(
                task, completed=self._bytes, total=self._total, description=self.facts()
            )
        elif time.monotonic() - self._told >= _INTERVAL:
            self._told = time.monotonic()
            part = f" ({self._bytes / self._total:.0%})" if self._total else ""
            say(f"run-batch: {self.facts()}{part}")

    def facts(self) -> str:
        """In numbers."""
        rate = self.tokens / max(time.monotonic() - self.began, 1e-3)
        return f"{self.answered} answered, {self.failed} failed, {rate:.1f} tokens/s"

    def close(self) -> None:
        """Leave the last numbers."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(total: int | None) -> "Progress":
    # Imported late: only a terminal has a use for it.
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("0 answered, 0 failed", total=total)
    bar.start()
    return bar
