"""How loading goes, on standard error: bytes have a bar on a terminal."""

import sys
import time
from typing import TYPE_CHECKING

from wire.logs import say
from wire.messages import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Loading:
    """Shown what is known from time to time; ``end`` closes the last stage. Every stage has a line
    that stays, and bytes are told with their rate, unless ``brief``."""

    def __init__(self, *, brief: bool = False) -> None:
        self._say = (lambda _: None) if brief else say
        self._shown: Progress | None = None
        self._began = 0.0
        self._bar: Bar | None = None

    def show(self, progress: Progress | None) -> None:
        """The last that is known; None: nothing yet."""
        if progress is None:
            return
        if self._shown is None or progress.stage != self._shown.stage:
            self.end()
            self._began = time.monotonic()
            if not progress.total:
                self._say(f"  {progress.stage}")
            elif sys.stderr.isatty():
                self._bar = _bar(progress)
        self._shown = progress
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=progress.done, refresh=True)

    def end(self) -> None:
        """The stage is over."""
        last, self._shown = self._shown, None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if last is not None and last.total:
            size, seconds = last.total / 1e9, time.monotonic() - self._began
            self._say(
                f"  {last.stage}: {size:.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s"
            )


def _bar(progress: Progress) -> "Bar":
    # Imported late: most servers have no terminal.
    from rich import progress as rich
    from rich.console import Console

    bar = rich.Progress(
        rich.TextColumn("  {task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
    bar.add_task(progress.stage, total=progress.total)
    bar.start()
    return bar
