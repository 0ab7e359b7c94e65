"""Many streams at once, some of whose clients leave at any moment. ``tests/e2e/test_streams.py``
runs a few in every build, ``benchmarks/streams.py`` hundreds."""

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
from typing import Any

from tests.servers import Server

GAUGES = (
    "internvl_requests_in_flight",
    "internvl_num_requests_running",
    "internvl_num_requests_waiting",
    "internvl_kv_blocks_used",
)


@dataclasses.dataclass
class Report:
    """How the streams ended: ``whole``, ``left`` by their clients, or else what came last."""

    whole: int = 0
    left: int = 0
    broken: list[bytes] = dataclasses.field(default_factory=list)


def request(number: int, tokens: int, **fields: Any) -> bytes:
    """A whole HTTP request for a stream of so many tokens; no two have the same prompt."""
    asked = {
        "messages": [{"role": "user", "content": f"Hello number {number}!"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(asked | fields).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    return head + body


async def load(
    server: Server, count: int, tokens: int, *, leave: float = 0, seed: int = 0
) -> Report:
    """``count`` streams at once; of the share ``leave`` the clients go at a random moment."""
    report = Report()
    draw = random.Random(seed)
    # About as many bytes as an answer has: some leave in its middle, some before it begins.
    moments = [
        draw.randrange(-500, 280 * tokens) if draw.random() < leave else None for _ in range(count)
    ]

    async def client(number: int, moment: int | None) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        asked = request(number, tokens)
        end = b""
        with contextlib.suppress(ConnectionError):
            writer.write(asked if moment is None or moment > -300 else asked[:moment])
            await writer.drain()
            while moment is None or moment > 0:
                data = await reader.read(1 << 16 if moment is None else moment)
                if not data:
                    break
                end = (end + data)[-2000:]
                if moment is not None:
                    moment -= len(data)
            if moment is not None:
                report.left += 1
            elif b'"completion_tokens":%d' % tokens in end and end.endswith(
                b"data: [DONE]\n\n\r\n0\r\n\r\n"
            ):
                report.whole += 1
            else:
                report.broken.append(end)
        writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for number, moment in enumerate(moments):
            group.create_task(client(number, moment))
    return report


def stall(server: Server, count: int, tokens: int, **fields: Any) -> list[socket.socket]:
    """Clients that ask for streams and read nothing."""
    clients = []
    for number in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(request(number, tokens, **fields))
        clients.append(client)
    return clients


def all_is_free(server: Server) -> None:
    """Wait until nothing is held for any request."""
    for gauge in GAUGES:
        server.wait_for_metric(gauge, 0)
