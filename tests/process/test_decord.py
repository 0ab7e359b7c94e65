"""decord as the reader: inside the sandbox, and only for what it reads rightly."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.media import FrameChoice
from tests import clips
from tests.process.test_video import COUNT, VARIANTS, seen
from tests.sandboxed import Worker, worker

pytest.importorskip("decord")

ROOT = Path(__file__).parents[2]

# Reads with decord alone, confined as a worker that may start threads.
ALONE = """
import io, json, sys
from preprocessing import sandbox, videos, worker
from preprocessing.containers import open_video, read_timeline
from tests import clips

encoded = [open(name, "rb").read() for name in sys.argv[1:]]
assert videos.load_decord()
worker._warm_up()
missing = sandbox.confine(2 << 30, threads=True)
found = []
for file in map(io.BytesIO, encoded):
    with open_video(file, 1 << 24) as video:
        timeline = read_timeline(video, 1000)
    facts = videos._look(file, timeline, "normalized", 1 << 24)
    pictures = videos._read_with_decord(file, timeline, facts, [3, 4, 17, 29])
    found.append([clips.number(one) if clips.is_upright(one) else None for one in pictures])
print(json.dumps([missing, found]))
"""

ABLE = ("plain.mp4", "b-frames.mp4", "faststart.mp4", "vp8.webm", "vp9.webm", "camera.mov")
UNABLE = ("av1.webm", "moving.gif", "hevc.mp4", "mpeg4.avi", "mpeg2.mpg", "b-frames.ts")


@pytest.fixture(scope="module")
def decord() -> Iterator[Worker]:
    with worker("decord") as started:
        yield started
        assert started.process.poll() is None


def test_decord_reads_inside_the_sandbox(tmp_path: Path) -> None:
    files = []
    for name in ABLE:
        options, told = VARIANTS[name]
        clips.encode(tmp_path / name, options, **told)
        files.append(str(tmp_path / name))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    missing, found = json.loads(done.stdout)
    assert found == [[3, 4, 17, 29]] * len(ABLE)
    assert "seccomp" not in missing


@pytest.mark.parametrize("name", [*ABLE, *UNABLE])
def test_what_decord_cannot_read_pyav_reads(name: str, decord: Worker, tmp_path: Path) -> None:
    options, told = VARIANTS[name]
    encoded = clips.encode(tmp_path / name, options, **told)
    answer, numbers = seen(decord, encoded, FrameChoice(7))
    assert answer.indices == numbers == [2, 6, 10, 14, 19, 23, 27]
    assert answer.facts.frames == COUNT


def test_a_broken_file_is_refused_as_without_decord(decord: Worker, tmp_path: Path) -> None:
    encoded = clips.encode(
        tmp_path / "clip.mp4", (*VARIANTS["plain.mp4"][0], "-movflags", "+faststart")
    )
    for length in range(0, len(encoded), len(encoded) // 8):
        answer, _ = decord.frames(encoded[:length], FrameChoice(4))
        assert getattr(answer, "reason", None) is not None
    _, numbers = seen(decord, encoded, FrameChoice(30))
    assert numbers == list(range(30))
