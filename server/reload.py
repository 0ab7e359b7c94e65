"""Files that are read again while the server runs: when they change, or when an operator says so.
What cannot be used changes nothing; the log says why."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from wire.settings import SettingError

logger = logging.getLogger(__name__)

INTERVAL = 1.0


class Reloader:
    """Calls ``load`` again, which has been called once already; it raises SettingError."""

    def __init__(self, what: str, files: Sequence[Path], load: Callable[[], None]) -> None:
        self._what = what
        self._files = files
        self._load = load
        self._seen = self._stamps()

    def reload(self) -> None:
        """Do so now."""
        self._seen = self._stamps()
        try:
            self._load()
        except SettingError as error:
            logger.error("%s: what was read before stays in force: %s", self._what, error)
        else:
            logger.info("%s: read again", self._what)

    async def watch(self) -> NoReturn:
        """Do so whenever a file changes; links are followed, so that a new target is a change."""
        while True:
            await asyncio.sleep(INTERVAL)
            if self._stamps() != self._seen:
                self.reload()

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
