"""What jobs leave in a decode worker: in the C library's heap, where no collector looks."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.media import FrameChoice, FramesJob, Job, LookJob, TileJob, TileSettings
from preprocessing.worker import answer
from tests.clips import encode
from tests.soak import CLIPS, Maker

TIMES = 300
LIMITS = {"max_pixels": 1 << 20, "seconds": 10}
TILES = TileSettings(112, 1, 12, True)
JOBS: dict[str, Job] = {
    "tile": TileJob(settings=TILES, **LIMITS),
    "look": LookJob(kind="image", treatment="normalized", max_frames=100, **LIMITS),
    "frames": FramesJob(
        settings=TILES, choice=FrameChoice(3), max_frames=100, reader="auto", **LIMITS
    ),
    "look at a video": LookJob(kind="video", treatment="normalized", max_frames=100, **LIMITS),
}


class _Heap(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def in_use() -> int:
    """Bytes that the C library has given out."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not tell what is in use")
    libc.mallinfo2.restype = _Heap
    return int(libc.mallinfo2().uordblks)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    maker = Maker(0, "")
    return [maker.encoded() for _ in range(60)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder: Path = tmp_path_factory.mktemp("clips")
    return [encode(folder / name, how, 12) for name, how in CLIPS.items()]


def whole(file: bytes) -> bytes:
    return file


def half(file: bytes) -> bytes:
    return file[: len(file) // 2]


@pytest.mark.parametrize("cut", [whole, half])
@pytest.mark.parametrize("name", JOBS)
def test_no_job_leaves_anything(
    name: str, cut: Callable[[bytes], bytes], pictures: list[bytes], videos: list[bytes]
) -> None:
    files = [cut(file) for file in (pictures if name in ("tile", "look") else videos)]

    def run() -> None:
        for index in range(TIMES):
            answer(JOBS[name], bytearray(files[index % len(files)]))

    run()
    before = in_use()
    run()
    # A packet and a list of streams, if nobody closes what reads them, are 150 bytes and more.
    assert in_use() - before < TIMES * 100
