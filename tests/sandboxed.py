"""One decode worker in its sandbox, asked directly over its channel."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from preprocessing import MediaPipeline
from preprocessing.media import (
    Answer,
    Confine,
    Confined,
    FrameChoice,
    FramesJob,
    FromWorker,
    Job,
    LookJob,
    TileSettings,
)
from preprocessing.pool import child_environment
from wire.channel import Channel

DEADLINE = 60.0
MEMORY = 2 << 30
SIDE = 128
COMMAND = ("-m", "preprocessing.worker")


def deaths(media: MediaPipeline) -> int:
    """Workers that nobody had asked to end."""
    stats = media.stats
    return stats.replaced - stats.kills["timeout"] - stats.kills["abandoned"]


class Worker:
    """A worker that has one job at a time; a job that it does not survive raises."""

    def __init__(
        self,
        video_reader: str = "auto",
        memory: int = MEMORY,
        command: Sequence[str] = COMMAND,
    ) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(DEADLINE)
        self._channel: Channel[FromWorker] = Channel(ours, FromWorker)
        self._reader = video_reader
        self.process = subprocess.Popen(
            [sys.executable, "-P", *command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=child_environment(),
        )
        theirs.close()
        self._channel.send(Confine(memory=memory, video_reader=video_reader))
        answer, _ = self._channel.receive()
        assert isinstance(answer, Confined)

    def ask(self, job: Job, encoded: bytes) -> tuple[Answer, list[Image.Image]]:
        """The answer, and the first tile of each buffer as a picture."""
        self._channel.send(job, [encoded])
        answer, buffers = self._channel.receive()
        assert not isinstance(answer, Confined)
        area = SIDE * SIDE
        pictures = [
            Image.merge(
                "RGB",
                [
                    Image.frombytes("L", (SIDE, SIDE), bytes(tiles[at : at + area]))
                    for at in range(0, 3 * area, area)
                ],
            )
            for tiles in buffers
        ]
        return answer, pictures

    def look(self, encoded: bytes, **changes: object) -> Answer:
        """What a LookJob finds."""
        job = LookJob(
            **{  # type: ignore[arg-type]
                "kind": "video",
                "treatment": "normalized",
                "max_pixels": 1 << 28,
                "max_frames": 10_000,
                "seconds": 20,
                **changes,
            }
        )
        return self.ask(job, encoded)[0]

    def frames(
        self, encoded: bytes, choice: FrameChoice, **changes: object
    ) -> tuple[Answer, list[Image.Image]]:
        """The chosen frames, each as one tile."""
        job = FramesJob(
            **{  # type: ignore[arg-type]
                "settings": TileSettings(SIDE, 1, 1, True),
                "choice": choice,
                "max_pixels": 1 << 28,
                "max_frames": 10_000,
                "reader": self._reader,
                "seconds": 20,
                **changes,
            }
        )
        return self.ask(job, encoded)

    def peak_bytes(self) -> int:
        """Most memory the worker ever held."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no VmHWM")

    def close(self) -> None:
        """End it."""
        self._channel.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def worker(
    video_reader: str = "auto", memory: int = MEMORY, command: Sequence[str] = COMMAND
) -> Iterator[Worker]:
    """A worker for the length of a block."""
    started = Worker(video_reader, memory, command)
    try:
        yield started
    finally:
        started.close()
