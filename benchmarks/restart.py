"""How long clients wait when the engine process is killed: the pause in their streams, over HTTP.

Starts the server, opens streams, kills the engine with SIGKILL while all of them run, and records
when each goes on and when the server is ready again. Prints JSON: seconds per round.

    python -m benchmarks.restart --streams 20 --rounds 5
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

BODY = {
    "messages": [{"role": "user", "content": "Hello!"}],
    "stream": True,
    "temperature": 0,
    "ignore_eos": True,
}


class Server:
    """``python -m server`` in a child process, on a port of its choice."""

    def __init__(self, flags: list[str]) -> None:
        self._flags = flags

    async def __aenter__(self) -> "Server":
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "server", "--port", "0", *self._flags),
            stderr=asyncio.subprocess.PIPE,
        )
        assert self.process.stderr is not None
        found = None
        while found is None:
            line = await self.process.stderr.readline()
            assert line, "the server did not start"
            found = re.search(rb"listening on (http://\S+?),", line)
        self.client = httpx.AsyncClient(base_url=found[1].decode(), timeout=600)
        self._log = asyncio.create_task(self.process.stderr.read())
        await self.wait_for(200)
        return self

    async def wait_for(self, status: int) -> float:
        """When ``/ready`` first answers with ``status``."""
        while True:
            if (await self.client.get("/ready")).status_code == status:
                return time.monotonic()
            await asyncio.sleep(0.005)

    def engine(self) -> int:
        """Process id of the engine."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == self.process.pid and b"engine" in words:
                return int(entry.name)
        raise LookupError("the server runs no engine")

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        self.process.terminate()
        await self.process.wait()
        await self._log


async def stream(server: Server, tokens: int, arrivals: list[float], begun: asyncio.Event) -> None:
    """One answer; when each of its chunks came."""
    body = BODY | {"max_tokens": tokens}
    async with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if '"finish_reason":null' in line:
                arrivals.append(time.monotonic())
                begun.set()


async def measure_round(server: Server, streams: int, tokens: int) -> dict[str, Any]:
    """Kill the engine once."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    begun = [asyncio.Event() for _ in range(streams)]
    tasks = [
        asyncio.create_task(stream(server, tokens, times, event))
        for times, event in zip(arrivals, begun, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in begun))
    os.kill(server.engine(), signal.SIGKILL)
    killed = time.monotonic()
    await server.wait_for(503)
    ready = await server.wait_for(200)
    await asyncio.gather(*tasks)
    resumed = [next(t for t in times if t > ready) - killed for times in arrivals]
    return {
        "ready_again": round(ready - killed, 3),
        "first_stream_goes_on": round(min(resumed), 3),
        "last_stream_goes_on": round(max(resumed), 3),
    }


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    """All rounds against one server."""
    async with Server(arguments.flags) as server:
        found = [
            await measure_round(server, arguments.streams, arguments.tokens)
            for _ in range(arguments.rounds)
        ]
    return {
        "streams": arguments.streams,
        "rounds": found,
        "median": {key: statistics.median(row[key] for row in found) for key in found[0]},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="for the server, after --")
    print(json.dumps(asyncio.run(run(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
