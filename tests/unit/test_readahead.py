"""Files that are read ahead of those who map them."""

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.readahead import read_ahead

SIZE = 16 << 20


def read_so_far() -> int:
    """Bytes that this process has read, wherever from."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["rchar"])


def is_there(path: Path) -> bool:
    """Whether all of it is in the page cache; asking brings nothing there."""
    pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(SIZE), pages)
        del start
    return all(page & 1 for page in pages)


def written(path: Path, begun: Sequence[int] = ()) -> None:
    """A file of which nothing is in the page cache but the beginnings of some blocks."""
    with path.open("wb+") as file:
        file.write(bytes(SIZE))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in begun:
            os.pread(file.fileno(), 1, offset)
    if is_there(path):
        pytest.skip("this file system keeps files in memory")


@pytest.mark.parametrize("begun", [(), range(0, SIZE, 4 << 20)], ids=["nothing", "some"])
def test_all_of_a_file_is_read_while_somebody_is_busy_with_it(
    tmp_path: Path, begun: Sequence[int]
) -> None:
    path = tmp_path / "file"
    written(path, begun)
    deadline = time.monotonic() + 60
    with read_ahead(path):
        while not is_there(path):
            assert time.monotonic() < deadline


def test_nothing_more_is_read_when_nobody_is(tmp_path: Path) -> None:
    path, before = tmp_path / "file", read_so_far()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(KeyError), read_ahead(path):
        raise KeyError
    assert read_so_far() < before + (1 << 39)
