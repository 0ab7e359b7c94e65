"""Clients that take their time, over real sockets: what they hold is given back."""

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Iterable

import pytest

from server.chat.sse import EventStream
from server.chat.stream import events, fold
from server.run import HEAD_LIMIT, _config
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import within
from tests.fake_engine import FakeEngine, Step
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineRequest

HELLO = b'{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'


def head(length: int) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


async def connect(port: int, first: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose ``first`` bytes are there before the server knows of it."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(first)
    return await asyncio.open_connection(sock=client)


async def test_a_body_that_stops_is_408_and_its_permit_is_free_again(houses: Houses) -> None:
    house = await houses.open(body_timeout=0.3, max_concurrent_requests=1)
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(1000) + b" ")
        answer = await within(reader.read())  # up to the end of the connection
        writer.close()
    headers, _, body = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 408 ")
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "invalid_request_error")
    assert "0.3 seconds" in error["message"]
    assert house.service.gate.idle.is_set()
    assert (await house.ask()).status_code == 200


async def test_a_body_that_dribbles_in_has_no_more_time_than_one_that_stops(houses: Houses) -> None:
    house = await houses.open(body_timeout=0.3)

    async def dribble() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    answer = await within(
        house.http.post(
            "/v1/chat/completions",
            headers={"Content-Type": "application/json"},
            content=dribble(),
        )
    )
    assert answer.status_code == 408


async def test_an_answer_may_take_longer_than_the_body_was_allowed_to(houses: Houses) -> None:
    house = await houses.open(body_timeout=0.1, keep_alive_interval=0.1)
    go_on = asyncio.Event()
    house.engine.script = lambda _: [encode_rendered("Yes"), go_on]
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(len(HELLO)) + HELLO)
        for _ in range(3):
            await within(reader.readuntil(b": keep-alive"))
        writer.close()
        await within(house.engine.abort_seen.wait())


CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("begin", "more", "status"),
    [
        (b"GET /live HTTP/1.1\r\n", b"X-More: and more\r\n", b"HTTP/1.1 400 "),
        (b"GET /live HTTP/1.1\r\nX-More: ", b"and more", b"HTTP/1.1 400 "),
        (b"GET /live?", b"and=more&", b"HTTP/1.1 400 "),
        (CHUNKED + b"1;", b"and=more;", b""),
        (CHUNKED + b"1\r\n \r\n0\r\n", b"X-More: and more\r\n", b""),
    ],
    ids=["headers", "a header", "the path", "a chunk's extension", "trailers"],
)
async def test_what_is_no_body_must_not_go_on_for_ever(
    houses: Houses, begin: bytes, more: bytes, status: bytes
) -> None:
    house = await houses.open()
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing() and not reader.at_eof():
                writer.write(more * (4096 // len(more)))
                await within(writer.drain())
                await asyncio.sleep(0)
                sent += 4096
                assert sent < 64 << 20
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await within(reader.read())
        writer.close()
    assert answer.startswith(status) or not answer  # a reset may overtake it
    await within(house.service.gate.idle.wait())
    assert (await house.ask()).status_code == 200


async def test_large_bodies_and_many_requests_on_a_connection_are_no_large_head(
    houses: Houses,
) -> None:
    house = await houses.open()
    long = HELLO.replace(b', "stream": true', b"") + b" " * 32 * HEAD_LIMIT
    asked = [head(len(long)) + long] * 3
    asked += [b"GET /live HTTP/1.1\r\nX-More: " + b"x" * (HEAD_LIMIT // 4) + b"\r\n\r\n"] * 6
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in asked:
            writer.write(request)
            answer = await within(reader.readuntil(b"\r\n\r\n"))
            assert answer.startswith(b"HTTP/1.1 200 ")
            length = int(answer.lower().partition(b"content-length:")[2].split()[0])
            await within(reader.readexactly(length))
        writer.close()


@pytest.mark.parametrize("before", [b"", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"", b"\r\n"),
        (b"GET /live HTTP/1.1\r\nX-Mo", b""),
        (b"GET /live HTTP/1.1\r\nX-Mo", b"o"),
        (b"GET /live HTTP/1.1\r\nX: y\r\n", b"X: y\r\n"),
    ],
)
async def test_a_connection_without_a_whole_head_is_closed(
    houses: Houses, before: bytes, begin: bytes, drip: bytes
) -> None:
    house = await houses.open(head_timeout=0.2)
    async with listening(house) as port:
        reader, writer = await connect(port, before)
        if before:
            assert (await within(reader.readuntil(b"}"))).startswith(b"HTTP/1.1 200 ")
        writer.write(begin)
        ended = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(60):
            while not ended.done():
                writer.write(drip)
                await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            ended.result()
        writer.close()


async def test_a_head_in_time_is_followed_by_what_takes_long(houses: Houses) -> None:
    house = await houses.open(head_timeout=0.1, keep_alive_interval=0.1)
    go_on = asyncio.Event()
    house.engine.script = lambda _: [encode_rendered("Yes"), go_on]
    async with listening(house) as port:
        reader, writer = await connect(port, head(len(HELLO)))
        await asyncio.sleep(0.2)
        writer.write(HELLO)
        for _ in range(3):
            await within(reader.readuntil(b": keep-alive"))
        writer.close()
        await within(house.engine.abort_seen.wait())


@pytest.mark.parametrize("ahead", [1, 2, 40])
async def test_requests_sent_ahead_do_not_hide_that_the_client_has_left(
    houses: Houses, ahead: int
) -> None:
    # With more than one the connection is not read; then it is a comment that finds nobody there.
    house = await houses.open(keep_alive_interval=60 if ahead == 1 else 0.1)
    house.engine.script = lambda _: [encode_rendered("Yes"), asyncio.Event()]
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(len(HELLO)) + HELLO)
        await within(reader.readuntil(b"Yes"))
        writer.write((head(len(HELLO)) + HELLO) * ahead)
        await writer.drain()
        writer.close()
        await within(house.engine.abort_seen.wait())
        await within(house.service.gate.idle.wait())
    assert len(house.engine.requests) == 1


async def test_requests_sent_ahead_are_answered_in_their_order(houses: Houses) -> None:
    house = await houses.open()
    asked = [b"GET /live HTTP/1.1\r\nX-Request-Id: %d\r\n\r\n" % number for number in range(30)]
    asked[3] = head(len(HELLO)).replace(b"Host", b"X-Request-Id: 3\r\nHost") + HELLO
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(asked))
        for number in range(30):
            line = await within(reader.readuntil(b"x-request-id: %d\r\n" % number))
            assert line.count(b"HTTP/1.1 200 ") == 1
        writer.close()


@pytest.mark.parametrize("cut", [0, 1, 40, 150, 400])
async def test_a_request_that_offers_another_protocol_keeps_its_body(
    houses: Houses, cut: int
) -> None:
    house = await houses.open()
    body = HELLO.replace(b', "stream": true', b"")
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    asked = (head(len(body))[:-2] + offer + body) * 2
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in (asked[:cut], asked[cut:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        for _ in range(2):
            answer = await within(reader.readuntil(b"\r\n\r\n"))
            assert answer.startswith(b"HTTP/1.1 200 ")
            length = int(answer.lower().partition(b"content-length:")[2].split()[0])
            await within(reader.readexactly(length))
        writer.close()
    assert len(house.engine.requests) == 2


async def test_the_body_of_a_request_is_never_the_next_request(houses: Houses) -> None:
    house = await houses.open()
    hidden = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"
    offer = b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
    async with listening(house) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(len(hidden))[:-2] + offer + hidden)
        answer = await within(reader.read())
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def endless(_: EngineRequest) -> Iterable[Step]:
    return itertools.repeat(encode_rendered("A red circle. " * 1000))


async def test_a_stream_nobody_reads_is_aborted_and_its_permit_is_free_again(
    houses: Houses, caplog: pytest.LogCaptureFixture
) -> None:
    house = await houses.open(FakeEngine(script=endless), send_timeout=0.3)
    async with listening(house) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(head(len(HELLO)) + HELLO)
            await asyncio.wait_for(house.engine.abort_seen.wait(), 60)
            await within(house.service.gate.idle.wait())
    assert house.engine.aborted == [house.engine.requests[0].id]
    assert "unexpected error" not in caplog.text


async def test_several_choices_nobody_reads_do_not_pile_up(houses: Houses) -> None:
    house = await houses.open(send_timeout=0.5)
    made = 0

    def count(_: EngineRequest) -> Iterable[Step]:
        nonlocal made
        while True:
            made += 1
            yield encode_rendered("A red circle. ")

    house.engine.script = count
    body = HELLO.replace(b"{", b'{"n": 4, ', 1)
    async with listening(house) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(head(len(body)) + body)
            await asyncio.wait_for(house.engine.abort_seen.wait(), 60)
            await within(house.service.gate.idle.wait())
    # What was on its way: the rest had stayed with the engine client, which joins it.
    assert made < 2000


async def test_an_answer_that_is_cut_before_its_first_byte_ends_its_source() -> None:
    closed = asyncio.Event()
    begun = asyncio.Event()

    async def source():  # type: ignore[no-untyped-def]
        try:
            begun.set()
            await asyncio.Event().wait()
            yield b""
        finally:
            closed.set()

    async def forever(*_: object) -> None:
        await asyncio.Event().wait()

    stream = EventStream(source(), keep_alive=60)
    scope = {"type": "http", "method": "POST"}
    task = asyncio.ensure_future(stream(scope, forever, forever))  # type: ignore[arg-type]
    await within(begun.wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


async def test_an_answer_nobody_calls_for_has_asked_for_nothing() -> None:
    """A stream could be lost between the route and the sending, with the engine at work for it."""
    begun = asyncio.Event()

    async def source():  # type: ignore[no-untyped-def]
        begun.set()
        yield b""

    EventStream(source(), keep_alive=0.1)
    await asyncio.sleep(0)
    assert not begun.is_set()


@pytest.mark.parametrize("whole", [False, True])
async def test_a_reader_that_stops_closes_the_source_at_once(whole: bool) -> None:
    """Not when the garbage collector comes by."""
    closed = False

    async def source():  # type: ignore[no-untyped-def]
        nonlocal closed
        try:
            yield None  # what neither reader expects
        finally:
            closed = True

    kept = source()
    reading = fold(kept) if whole else anext(events(kept, include_usage=True))
    with pytest.raises(AttributeError):
        await reading
    assert closed


def test_connections_are_kept_for_longer_than_clients_and_proxies_go_on_using_them(
    house: House,
) -> None:
    assert _config(house.app, house.service.settings.server, None).timeout_keep_alive > 60
