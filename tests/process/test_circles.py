"""What a request leaves to the garbage collector: exceptions, frames and tasks that hold each
other, but nothing large. The collector counts objects, and comes late when each of them holds
megabytes."""

import asyncio
import dataclasses
import gc
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from preprocessing import MediaPipeline
from server.app import create_app
from server.lifecycle import Service
from tests import small_tokenizer
from tests.api.conftest import House, listening
from tests.fake_engine import FakeEngine, make_ready, say
from tests.servers import data_uri, draw, encode
from wire.geometry import VisionGeometry
from wire.messages import EngineOutput
from wire.settings import EngineSettings, MediaSettings, ServerSettings, Settings

TILE = 224
LARGE = 1 << 16  # bytes; a tile has more
WHOLE = data_uri(encode(draw("red", "circle", (300, 300)), "bmp"))
HALF = WHOLE[: len(WHOLE) // 8 * 4]
NOT_BASE64 = WHOLE[:-3] + "!"


@dataclasses.dataclass
class Running:
    """An application with real media behind a real socket, and a site that never answers."""

    port: int
    engine: FakeEngine
    service: Service
    silent: str


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    folder = small_tokenizer.save(tmp_path / "tiny")
    media = MediaSettings(
        allow_private_media=True, allowed_media_ports=(), fetch_timeout=2.0, tile_cache_bytes=0
    )
    settings = Settings(ServerSettings(), media, EngineSettings(model=str(folder)))
    geometry = VisionGeometry(tile_size=TILE, tokens_per_tile=3)
    engine = FakeEngine(msgspec.structs.replace(make_ready(), geometry=geometry))
    pipeline = MediaPipeline(media)
    app = create_app(settings, engine, pipeline)
    service: Service = app.state.service
    await service.start()
    await service.settled.wait()
    gone = asyncio.Event()

    async def wait(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    site = await asyncio.start_server(wait, "127.0.0.1", 0)
    house = House(app, engine, pipeline, None, None)  # type: ignore[arg-type]
    async with listening(house) as port:
        yield Running(
            port, engine, service, f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/"
        )
    gone.set()
    site.close()
    await service.stop()


async def post(port: int, *urls: str, wait_for: asyncio.Event | None, **fields: Any) -> bytes:
    """The whole answer; or nothing, from a client that leaves after ``wait_for``. Written by hand,
    so that the client has no circles of its own."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()
    return await send(port, "/v1/chat/completions", "application/json", body, wait_for)


async def send(
    port: int, path: str, kind: str, body: bytes, wait_for: asyncio.Event | None = None
) -> bytes:
    """Likewise, of any request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = b""
    if wait_for is None:
        answer = await reader.read()
    else:
        await wait_for.wait()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


def left_behind() -> list[str]:
    """What the collector would find that is large."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = []
    for garbage in gc.garbage:
        for held in gc.get_referents(garbage):
            size = len(held.getbuffer()) if isinstance(held, io.BytesIO) and not held.closed else 0
            if isinstance(held, bytes | bytearray | str):
                size = len(held)
            if size >= LARGE:
                found.append(f"a {type(garbage).__name__} holds {size} bytes")
    gc.garbage.clear()
    return found


@pytest.mark.usefixtures("no_collector")
async def test_no_request_leaves_its_pictures_to_the_garbage_collector(running: Running) -> None:
    begun, never = asyncio.Event(), asyncio.Event()

    def endless(_: Any) -> Iterator[Any]:
        yield [1]
        begun.set()
        yield never

    fails = [EngineOutput("", [1]), RuntimeError("told to")]
    cases: dict[str, tuple[Any, bytes, list[str], dict[str, Any]]] = {
        "whole": (say("A red circle."), b"200", [WHOLE], {}),
        "streamed": (say("A red circle."), b"200", [WHOLE], {"stream": True}),
        "choices": (say("A red circle."), b"200", [WHOLE], {"n": 3}),
        "streamed choices": (say("A red circle."), b"200", [WHOLE], {"n": 3, "stream": True}),
        "stopped": (say("A red circle."), b"200", [WHOLE], {"n": 2, "stop": ["red"]}),
        "engine fails": (lambda _: iter(fails), b"500", [WHOLE], {}),
        "broken": (say(""), b"400", [WHOLE, HALF], {}),
        "no base64": (say(""), b"400", [WHOLE, NOT_BASE64], {}),
        "not fetched": (say(""), b"400", [WHOLE, running.silent], {}),
        "client leaves": (endless, b"", [WHOLE], {"stream": True}),
        "of two choices": (endless, b"", [WHOLE], {"n": 2}),
    }
    found = {}
    for name, (script, status, urls, fields) in cases.items():
        begun.clear()
        running.engine.aborted.clear()
        running.engine.abort_seen.clear()
        running.engine.script = script
        leaves = None if status else begun
        answer = await post(running.port, *urls, wait_for=leaves, **fields)
        assert answer.startswith(b"HTTP/1.1 " + status if status else b""), (name, answer)
        if leaves is not None:
            await running.engine.abort_seen.wait()
        await running.service.gate.idle.wait()
        running.engine.buffers.clear()
        if left := left_behind():
            found[name] = left
    assert not found


PICTURE = encode(draw("red", "circle", (300, 300)), "bmp")


@pytest.mark.usefixtures("no_collector")
async def test_no_upload_leaves_its_file_to_the_garbage_collector(running: Running) -> None:
    cases: dict[str, tuple[bytes, bytes, bytes]] = {
        "kept": (PICTURE, b"vision", b"200"),
        "for nothing that is here": (PICTURE, b"batch", b"400"),
        "no picture": (b"no picture" * LARGE, b"vision", b"400"),
        "broken": (b"\x89PNG\r\n\x1a\n" + bytes(LARGE), b"vision", b"400"),
        "with a field that is too long": (PICTURE, b"vision" * 999, b"400"),
        "no form": (PICTURE + b"\r\n--b\r\n?", b"", b"400"),
    }
    found = {}
    part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    for name, (data, purpose, status) in cases.items():
        body = part % (b"file", data) + part % (b"purpose", purpose) + b"--b--\r\n"
        answer = await send(running.port, "/v1/files", "multipart/form-data; boundary=b", body)
        assert answer.startswith(b"HTTP/1.1 " + status), (name, answer)
        await running.service.gate.idle.wait()
        if left := left_behind():
            found[name] = left
    assert not found
