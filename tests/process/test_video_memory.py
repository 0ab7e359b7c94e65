"""What reading a video leaves in the C library's heap, where no collector of Python's looks."""

import ctypes
import gc
from pathlib import Path

import pytest

from preprocessing.media import LookJob
from preprocessing.videos import look_video
from tests.clips import encode

LOOKS = 300
JOB = LookJob(kind="video", treatment="normalized", max_pixels=1 << 20, max_frames=100, seconds=10)


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


@pytest.mark.parametrize("name", ["a.mkv", "a.gif"])
def test_a_video_of_which_one_frame_is_read_leaves_nothing(tmp_path: Path, name: str) -> None:
    codec = ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"] if name == "a.mkv" else []
    video = encode(tmp_path / name, codec, 12)
    for _ in range(LOOKS):
        look_video(video, JOB)
    before = in_use()
    for _ in range(LOOKS):
        look_video(video, JOB)
    # Two packets and lists of streams, of 150 bytes, if nobody closes what reads them.
    assert in_use() - before < LOOKS * 100
