"""A decode worker in the hands of an attacker: ``python -m tests.process.lying_worker MODE FD``."""

import socket
import struct
import sys
from typing import Any

from preprocessing.media import (
    Confined,
    Frames,
    PictureFacts,
    Reason,
    Refused,
    Tiled,
    ToWorker,
    VideoFacts,
)
from wire.channel import Channel

SIDE = 16
TILE = bytes(3 * SIDE * SIDE)
HONEST = Tiled(count=1, columns=1, rows=1, width=5, height=5)

REPLIES: dict[str, tuple[Any, list[bytes]]] = {
    "no tiles": (HONEST, []),
    "two buffers": (HONEST, [TILE, TILE]),
    "too few bytes": (HONEST, [TILE[:-1]]),
    "too many bytes": (HONEST, [TILE * 2]),
    "wrong count": (Tiled(count=2, columns=1, rows=1, width=5, height=5), [TILE * 2]),
    "too many tiles": (Tiled(count=14, columns=13, rows=1, width=5, height=5), [TILE * 14]),
    "negative grid": (Tiled(count=1, columns=-1, rows=-1, width=5, height=5), [TILE]),
    "no size": (Tiled(count=1, columns=1, rows=1, width=0, height=5), [TILE]),
    "a size over the limit": (Tiled(1, 1, 1, 1 << 20, 1 << 20), [TILE]),
    "another grid": (Tiled(count=3, columns=2, rows=1, width=5, height=5), [TILE * 3]),
    "empty buffers": (HONEST, [b""] * 100),
    "unknown reason": ({"type": "refused", "reason": "<script>"}, []),
    "unknown message": ({"type": "import os"}, []),
    "another hello": (Confined([]), []),
    "pickle": (b"cos\nsystem\n(S'true'\ntR.", []),
}

FILM = VideoFacts("mp4", "h264", 5, 5, 0, frames=9, duration=1.0, fps=9.0)
TWO = Frames(FILM, [0, 1], [0.0, 0.5], [HONEST, HONEST])
VIDEO_REPLIES: dict[str, tuple[Any, list[bytes]]] = {
    "a picture for a film": (HONEST, [TILE]),
    "no frames": (Frames(FILM, [], [], []), []),
    "frames without tiles": (TWO, []),
    "fewer tiles than frames": (TWO, [TILE]),
    "fewer times than frames": (Frames(FILM, [0, 1], [0.0], [HONEST, HONEST]), [TILE, TILE]),
    "fewer numbers than frames": (Frames(FILM, [0], [0.0, 0.5], [HONEST, HONEST]), [TILE, TILE]),
    "more frames than asked for": (
        Frames(FILM, [0, 1, 2], [0.0, 0.1, 0.2], [HONEST] * 3),
        [TILE] * 3,
    ),
    "a frame of many tiles": (
        Frames(FILM, [0], [0.0], [Tiled(5, 2, 2, 5, 5)]),
        [TILE * 5],
    ),
    "no time": (Frames(FILM, [0], [float("nan")], [HONEST]), [TILE]),
    "no duration": (
        Frames(VideoFacts("mp4", "h264", 5, 5, 0, 9, float("inf"), 9.0), [0], [0.0], [HONEST]),
        [TILE],
    ),
    "facts only": (FILM, []),
    "a number below nought": (Frames(FILM, [-1], [0.0], [HONEST]), [TILE]),
    "a number twice": (Frames(FILM, [1, 1], [0.0, 0.5], [HONEST, HONEST]), [TILE, TILE]),
    "a number that is no frame's": (Frames(FILM, [9], [0.0], [HONEST]), [TILE]),
    "a rate below nought": (
        Frames(VideoFacts("mp4", "h264", 5, 5, 0, 9, 1.0, -9.0), [0], [0.0], [HONEST]),
        [TILE],
    ),
}
LOOK_REPLIES: dict[str, tuple[Any, list[bytes]]] = {
    "tiles for a look": (HONEST, [TILE]),
    "a film for a picture": (FILM, []),
    "facts with a buffer": (PictureFacts("PNG", 5, 5), [TILE]),
    "facts without pixels": (PictureFacts("PNG", 0, 5), []),
    "markup for a format": (PictureFacts("<script>", 7, 3), []),
    "a line for a format": (PictureFacts("PNG\n", 7, 3), []),
    "a ninth orientation": (PictureFacts("PNG", 7, 3, orientation=9), []),
    "more pixels than are decoded": (PictureFacts("PNG", 1 << 20, 1 << 20), []),
    "a refusal with a buffer": (Refused(Reason.BROKEN), [TILE]),
}
LONG_REPLIES: dict[str, tuple[Any, list[bytes]]] = {
    # Far fewer bytes than the frames that were asked for, but they are not frames.
    "a long list": (Frames(FILM, [0] * 6000, [0.0], [HONEST]), [TILE]),
}
ALL = REPLIES | VIDEO_REPLIES | LOOK_REPLIES | LONG_REPLIES


def main(mode: str, descriptor: int) -> None:
    sock = socket.socket(fileno=descriptor)
    channel: Channel[Any] = Channel(sock, ToWorker)
    channel.receive()
    if mode == "dies at start":
        return
    channel.send(Confined(["landlock"] if mode == "lacks a layer" else []))
    channel.receive()
    if mode == "half a frame":
        sock.sendall(struct.pack("<II", 1000, 1) + b"x")
    elif mode == "endless frame":
        sock.sendall(struct.pack("<II", 8, 1) + b"x" * 8 + struct.pack("<Q", 1 << 27))
        sock.recv(1)
    elif mode != "dies at work":
        channel.send(*ALL[mode])
        channel.receive()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
