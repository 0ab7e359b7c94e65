"""A decode worker in the hands of an attacker: ``python -m tests.process.lying_worker MODE FD``."""

import socket
import struct
import sys
from typing import Any

from preprocessing.media import Confined, Tiled, ToWorker
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
    "unknown reason": ({"type": "refused", "reason": "<script>"}, []),
    "unknown message": ({"type": "import os"}, []),
    "another hello": (Confined([]), []),
    "pickle": (b"cos\nsystem\n(S'true'\ntR.", []),
}


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
        channel.send(*REPLIES[mode])
        channel.receive()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
