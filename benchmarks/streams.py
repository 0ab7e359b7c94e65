"""Many streams at once: that none is lost, that clients which leave free what they held, and what
clients cost that read nothing.

    python -m benchmarks.streams [--streams 500] [--stalled 1000]

First the demo model, over HTTP: ``--streams`` streams of 64 tokens at once; then again, while 60 %
of the clients leave at a random moment, before their request is whole to behind their last token.
Then the API process alone, with the engine of benchmarks.frontend: ``--stalled`` clients read
nothing while the engine offers them 1,500 tokens each. Prints JSON; memory in MiB.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import frontend
from tests.load import all_is_free, load, request
from tests.servers import Server

TOKENS = 64
STALLED_TOKENS = 1500
OFFERED = 50_000.0
# That this process, or the server, has open beside its connections.
OTHER_FILES = 100
# Seconds in which every stalled client must have been offered its tokens.
PATIENCE = 300.0


def resident(pid: int) -> float:
    """Of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return round(int(fields["VmRSS"].split()[0]) / 1024, 1)


def in_sockets() -> float:
    """What the kernel holds for all TCP connections of the machine, in MiB."""
    for line in Path("/proc/net/sockstat").read_text(encoding="ascii").splitlines():
        if line.startswith("TCP:"):
            return round(int(line.split()[-1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1)
    return 0.0


def demo(streams: int, folder: Path) -> dict[str, Any]:
    flags = ["--max-concurrent-requests", str(2 * streams)]
    flags += ["--max-num-queued-reqs", str(2 * streams)]
    server = Server(folder / "demo", flags)
    found: dict[str, Any] = {"streams": streams, "tokens": TOKENS}
    try:
        for name, share in {"all stay": 0.0, "60 % leave": 0.6, "and again": 0.6}.items():
            began = time.monotonic()
            report = asyncio.run(load(server, streams, TOKENS, leave=share, seed=len(found)))
            seconds = time.monotonic() - began
            all_is_free(server)  # raises if anything is held 20 s later
            found[name] = {
                "whole": report.whole,
                "left": report.left,
                "lost": len(report.broken),
                "seconds": round(seconds, 1),
                "blocks_held_afterwards": server.metric("internvl_kv_blocks_used"),
                "api_mib": resident(server.process.pid),
            }
    finally:
        server.close()
    return found


@contextlib.contextmanager
def all_descriptors() -> Iterator[int]:
    """Have this process open as many files as it may; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def stalled(count: int, tokens: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """``count`` clients, or as many as this machine lets a process have."""
    with all_descriptors() as most:
        return _stalled(min(count, most - OTHER_FILES), tokens, flags, folder)


def _stalled(count: int, tokens: int, flags: list[str], folder: Path) -> dict[str, Any]:
    server = frontend.Server(count, OFFERED, folder, ["--send-timeout", "600", *flags])
    clients = []
    try:
        before = resident(server.pid), in_sockets()
        for number in range(count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request(number, tokens))
            clients.append(client)
        seen = []
        end = time.monotonic() + PATIENCE
        while not server.sent.exists():
            assert time.monotonic() < end, "the engine could not send its tokens"
            time.sleep(1)
            server.check()
            seen.append((resident(server.pid), in_sockets()))
        return {
            "clients": count,
            "tokens_each": tokens,
            "api_mib_before": before[0],
            "api_mib_most": max(api for api, _ in seen),
            "sockets_mib_before": before[1],
            "sockets_mib_most": max(sockets for _, sockets in seen),
        }
    finally:
        for client in clients:
            client.close()
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--stalled", type=int, default=1000)
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.streams:
            found["demo"] = demo(arguments.streams, folder)
        if arguments.stalled:
            found["stalled"] = stalled(arguments.stalled, STALLED_TOKENS, [], folder)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
