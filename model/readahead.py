"""Brings a file into the page cache by several reads at once, ahead of whoever maps it.

A mapping is read where it is touched, a little at a time. A disk that others use too gives twice as
much to many readers (docs/performance.md, "Loading").
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_READERS = 8
_BLOCK = 4 << 20

_AT_ONCE = getattr(os, "RWF_NOWAIT", 0)  # or not at all


@contextlib.contextmanager
def read_ahead(path: Path) -> Iterator[None]:
    """Read the file while the body runs; what is not read by its end is left."""
    ended = threading.Event()

    def read(number: int, offsets: range) -> None:
        memory = bytearray(_BLOCK)
        for offset in offsets:
            if ended.is_set():
                return
            # The kernel reads on a little after each block: its last byte is not there by that.
            if not _is_there(number, min(offset + _BLOCK, size) - 1):
                os.preadv(number, [memory], offset)

    with path.open("rb") as file, ThreadPoolExecutor(_READERS, "read-ahead") as readers:
        number, size = file.fileno(), os.fstat(file.fileno()).st_size
        for reader in range(_READERS):
            readers.submit(read, number, range(reader * _BLOCK, size, _READERS * _BLOCK))
        try:
            yield
        finally:
            ended.set()


def _is_there(number: int, offset: int) -> bool:
    """Whether the cache has what stands there; copying it once more would take a core's time."""
    try:
        return os.preadv(number, [bytearray(1)], offset, _AT_ONCE) == 1
    except OSError:  # it would wait, or the file system cannot say
        return False
