"""Streams that can be resumed, over real sockets: whatever breaks, nothing is missed and nothing
comes twice."""

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest

from server.chat.recording import Recording
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import until, within
from tests.fake_engine import EOS, FakeEngine, Script, Step, say
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed
from wire.logs import request_id
from wire.messages import EngineOutput, EngineRequest

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "Hello!"}], "stream": True}
RESUMABLE = ASK | {"stream_options": {"resumable": True, "include_usage": True}}
TEXT = "A red circle, 🙂 a blue square and é. " * 4


class Reader:
    """A client that loses its connection, and knows what it has read of whole events."""

    def __init__(self, port: int, path: str = CHAT, body: dict[str, Any] = RESUMABLE) -> None:
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.path = path
        self.body = body
        self.events: list[tuple[int, str]] = []
        self.name = ""

    @property
    def last(self) -> int:
        return self.events[-1][0] if self.events else 0

    @property
    def is_done(self) -> bool:
        return bool(self.events) and self.events[-1][1] == "[DONE]"

    async def read(self, most: int = 1 << 30, **headers: str) -> int:
        """Ask, or come back, and lose the connection after so many bytes. Returns the status."""
        if self.name:
            headers = {"Last-Event-ID": str(self.last)} | headers
            asked = self.client.stream("GET", f"{self.path}/{self.name}/events", headers=headers)
        else:
            asked = self.client.stream("POST", self.path, json=self.body, headers=headers)
        async with asyncio.timeout(60), asked as answer:
            place = answer.headers.get("content-location")
            if place is not None:
                self.name = str(answer.url.join(place)).split("/")[-2]
            if answer.status_code != 200:
                await answer.aread()
                return answer.status_code
            data = b""
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) >= most:
                    break
        for event in data[:most].split(b"\n\n")[:-1]:
            if not event.startswith(b":"):
                fields = dict(line.split(": ", 1) for line in event.decode().split("\n"))
                self.events.append((int(fields.get("id", 0)), fields["data"]))
        return answer.status_code

    def answer(self) -> list[Any]:
        """All events, without what is another one's in another request."""
        assert [number for number, _ in self.events] == list(range(1, len(self.events) + 1))
        assert self.is_done
        chunks = [json.loads(data) for _, data in self.events[:-1]]
        return [{**chunk, "id": "", "created": 0} for chunk in chunks]

    def text(self) -> str:
        return "".join(
            choice["delta"].get("content") or ""
            for chunk in self.answer()
            for choice in chunk.get("choices", ())
        )


@contextlib.asynccontextmanager
async def reading(house: House, **options: Any) -> AsyncIterator[Reader]:
    async with listening(house) as port:
        reader = Reader(port, **options)
        async with reader.client:
            yield reader


async def left(house: House) -> Recording:
    """The only answer that is kept, when nobody reads it any more."""
    (recording,) = house.service.recordings._by_name.values()
    await until(lambda: not recording.is_read)
    return recording


def in_two(first: str, go_on: asyncio.Event, second: str) -> Script:
    def script(request: EngineRequest) -> Iterable[Step]:
        yield encode_rendered(first)
        yield go_on
        yield encode_rendered(second)
        yield EngineOutput(request.id, [EOS], "stop", EOS)

    return script


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 0}, {"stop": ["square"]}],
    ids=["plain", "n", "logprobs", "stop"],
)
async def test_a_stream_cut_anywhere_is_the_stream_that_is_not_cut(
    houses: Houses, options: dict[str, Any]
) -> None:
    house = await houses.open(FakeEngine(script=say(TEXT)))
    draw = random.Random(7)
    async with reading(house, body=RESUMABLE | options) as whole:
        port = whole.client.base_url.port or 0
        await whole.read()
        expected = sorted(map(json.dumps, whole.answer()))
        size = sum(len(data) + 20 for _, data in whole.events)
        for _ in range(6):
            reader = Reader(port, body=RESUMABLE | options)
            cuts = 0
            async with reader.client:
                while not reader.is_done:
                    assert await reader.read(draw.choice((1, 300, size // 3, size))) == 200
                    cuts += 1
                    assert cuts < 10_000
            # Choices may take turns in another way; each one's events keep their order.
            assert sorted(map(json.dumps, reader.answer())) == expected
            if "n" not in options:
                assert reader.answer() == whole.answer()


async def test_the_text_is_that_of_a_plain_stream_and_of_no_stream(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=say(TEXT)))
    whole = (await house.ask()).json()["choices"][0]["message"]["content"]
    plain = (await house.ask(stream=True)).text
    assert "id: " not in plain
    async with reading(house) as reader:
        await reader.read(700)
        await reader.read()
    assert reader.text() == whole == TEXT
    kept = [json.loads(data)["choices"] for _, data in reader.events[:-1]]
    seen = [json.loads(line[6:])["choices"] for line in plain.splitlines() if "{" in line]
    assert [choices for choices in kept if choices] == seen


TOLD = {"stream": True, "stream_options": {"resumable": True}}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, RESUMABLE),
    "completions": ("/v1/completions", {"prompt": "Once", **TOLD}),
    "messages": ("/v1/messages", {"messages": ASK["messages"], "max_tokens": 200, **TOLD}),
    "responses": ("/v1/responses", {"input": "Hello!", **TOLD}),
    "background": ("/v1/responses", {"input": "Hello!", "stream": True, "background": True}),
}


async def read_on(
    client: httpx.AsyncClient, path: str, body: Any, place: httpx.URL | None, had: bytes, most: int
) -> tuple[httpx.URL, bytes, bool]:
    """Ask, or come back to ``place``, knowing ``had`` of whole events; lose the connection after
    so many bytes. Gives the place, what is had then, and whether it is all."""
    last = had.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
    if place is None:
        asked = client.stream("POST", path, json=body)
    elif place.query:
        if last:
            asked = client.stream("GET", place.copy_merge_params({"starting_after": last}))
        else:
            asked = client.stream("GET", place)
    else:
        asked = client.stream("GET", place, headers={"Last-Event-ID": last} if last else {})
    async with asyncio.timeout(60), asked as answer:
        assert answer.status_code in (200, 204)
        if place is None:
            place = answer.url.join(answer.headers["content-location"])
        data = b""
        async for piece in answer.aiter_raw():
            data += piece
            if len(data) >= most:
                whole = data[:most].rpartition(b"\n\n")
                return place, had + whole[0] + whole[1], False
    return place, had + data, True


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_what_is_read_in_pieces_is_what_was_sent_byte_for_byte(
    houses: Houses, dialect: str
) -> None:
    path, body = DIALECTS[dialect]
    house = await houses.open(FakeEngine(script=say(TEXT)))
    draw = random.Random(dialect)
    async with (
        listening(house) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        for size in (300, 1000, 10_000):
            place, had, whole = await read_on(client, path, body, None, b"", draw.randrange(size))
            while not whole:
                most = draw.choice((1, size, 4000))  # the last events have more than size
                place, had, whole = await read_on(client, path, body, place, had, most)
            _, again, _ = await read_on(client, path, body, place, b"", 1 << 30)
            assert had == again
            numbers = [int(line[4:]) for line in had.splitlines() if line.startswith(b"id: ")]
            first = 0 if path == "/v1/responses" else 1
            assert numbers == list(range(first, first + len(numbers)))
            if path == "/v1/responses":
                datas = [line[6:] for line in had.splitlines() if line.startswith(b"data: ")]
                assert [json.loads(data)["sequence_number"] for data in datas] == numbers
            # Nothing is missing: it ends by itself.
            assert await read_on(client, path, body, place, had, 1) == (place, had, True)


async def test_a_broken_connection_ends_nothing_and_the_answer_is_followed_live(
    houses: Houses,
) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    async with reading(house) as reader:
        await reader.read(300)
        assert not house.service.gate.idle.is_set()
        back = asyncio.ensure_future(reader.read())
        await asyncio.sleep(0.05)
        assert not back.done()
        assert not house.engine.aborted
        go_on.set()
        await within(back)
    assert reader.text() == "Yes No"
    assert house.service.gate.idle.is_set()


async def test_an_answer_nobody_comes_back_to_is_aborted_after_its_grace(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=in_two("Yes", asyncio.Event(), "")))
    async with reading(house) as reader:
        await reader.read(300)
        await left(house)
        house.service.recordings.grace = 0.1  # from here on
        assert await reader.read(1) == 200  # has come back, and leaves again
        assert not house.engine.aborted
        await within(house.engine.abort_seen.wait())
        await within(house.service.gate.idle.wait())
        assert await reader.read() == 404
    assert "internvl_resumable_bytes 0.0" in (await house.http.get("/metrics")).text


async def test_the_end_of_an_unread_answer_is_logged_for_who_asked(
    houses: Houses, caplog: pytest.LogCaptureFixture
) -> None:
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    class Sink(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.put_nowait((request_id.get(), record.getMessage()))

    sink, log = Sink(), logging.getLogger("server.chat.recording")
    log.addHandler(sink)
    caplog.set_level("INFO", log.name)
    try:
        house = await houses.open(FakeEngine(script=in_two("Yes", asyncio.Event(), "")))
        async with reading(house) as reader:
            await reader.read(300, **{"X-Request-Id": "who-asked"})
            await left(house)
            house.service.recordings.grace = 0.1  # from here on
            assert await reader.read(1, **{"X-Request-Id": "who-came-back"}) == 200
            identity, message = await within(seen.get())
    finally:
        log.removeHandler(sink)
    assert "nobody has come back" in message
    assert identity == "who-asked"


async def test_who_has_come_back_in_time_may_wait_for_as_long_as_it_takes(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    async with reading(house) as reader:
        await reader.read(300)
        recording = await left(house)
        assert recording._timer is not None
        back = asyncio.ensure_future(reader.read())
        await until(lambda: recording.is_read)
        assert recording._timer is None  # nothing ends it
        go_on.set()
        await within(back)
    assert reader.text() == "Yes No"


async def test_a_client_that_leaves_before_the_first_event_has_its_grace_too(
    houses: Houses,
) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    inner = house.engine.script
    house.engine.script = lambda request: [go_on, *inner(request)]
    async with reading(house) as reader:
        house.service.recordings._keep_alive = 0.05  # the head, and with it the place, comes then
        await reader.read(1)
        assert not reader.events
        go_on.set()
        await reader.read()
    assert reader.text() == "Yes No"


async def test_only_the_owner_of_the_key_may_read(houses: Houses) -> None:
    house = await houses.open(api_key=("one", "two"))
    async with reading(house) as reader:
        await reader.read(300, Authorization="Bearer one")
        for key, status in {"two": 404, "three": 401, "one": 200}.items():
            assert await reader.read(Authorization=f"Bearer {key}") == status
    assert reader.is_done


async def test_an_answer_that_is_over_is_kept_for_a_while_only(houses: Houses) -> None:
    house = await houses.open()
    async with reading(house) as reader:
        await reader.read()
        assert await reader.read() == 204  # nothing is missing
        del reader.events[3:]
        assert await reader.read() == 200
        assert reader.text() == "A red circle."
        recordings = house.service.recordings
        kept = recordings._total
        recordings._ttl = 0.05  # of the next
        other = Reader(reader.client.base_url.port or 0)
        async with other.client:
            await other.read()
            await until(lambda: len(recordings._by_name) == 1)
            assert await other.read() == 404
        assert await reader.read() == 204
    page = (await house.http.get("/metrics")).text
    assert f"internvl_resumable_bytes {float(kept)}\n" in page
    assert "internvl_streams_resumed_total 3.0" in page


@pytest.mark.parametrize("given", ["-1", "x", "1e3", "99", "", "٣", "9" * 30])
async def test_a_number_that_no_event_has_is_refused(houses: Houses, given: str) -> None:
    house = await houses.open()
    async with reading(house) as reader:
        await reader.read()
        answer = await reader.client.get(
            f"{CHAT}/{reader.name}/events", headers={b"Last-Event-ID": given.encode()}
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"


async def test_what_was_not_asked_to_be_resumable_is_not(houses: Houses) -> None:
    house = await houses.open()
    async with reading(house, body=ASK) as reader:
        await reader.read()
        assert not reader.name
        reader.name = json.loads(reader.events[0][1])["id"]
        assert await reader.read() == 404


async def test_an_error_behind_the_first_event_is_kept_too(houses: Houses) -> None:
    go_on = asyncio.Event()

    def script(_: EngineRequest) -> Iterable[Step]:
        yield encode_rendered("Yes")
        yield go_on
        yield EngineFailed("gone")

    house = await houses.open(FakeEngine(script=script))
    async with reading(house) as reader:
        await reader.read(300)
        go_on.set()
        await reader.read()
    assert reader.text() == "Yes"
    assert json.loads(reader.events[-2][1])["error"]["message"] == "gone"


async def test_an_error_before_the_first_event_has_its_own_status(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=lambda _: [EngineFailed("gone")]))
    answer = await house.http.post(CHAT, json=RESUMABLE)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "gone"
    assert not house.service.recordings._by_name
    assert house.service.gate.idle.is_set()


def endless(words: str) -> Script:
    return lambda _: iter(lambda: encode_rendered(words), None)


async def test_what_is_kept_is_bounded_and_old_events_are_forgotten(houses: Houses) -> None:
    limit = 1 << 20
    house = await houses.open(
        FakeEngine(script=endless("A red circle. " * 500)), resume_key_bytes=limit
    )
    async with reading(house) as reader:
        await reader.read(3000)
        recordings = house.service.recordings
        (recording,) = recordings._by_name.values()
        async with asyncio.timeout(60):
            while recording._first < 50:
                assert recordings._total <= limit
                await asyncio.sleep(0)
        assert await reader.read() == 410
        reader.events.append((recording.last, ""))
        count = len(reader.events)
        assert await reader.read(9000) == 200
        assert reader.events[count][0] == reader.events[count - 1][0] + 1


async def test_answers_that_are_over_give_way_to_others_the_oldest_first(houses: Houses) -> None:
    house = await houses.open(
        FakeEngine(script=say("A red circle. " * 200)), resume_key_bytes=1 << 20
    )
    names = []
    for _ in range(5):
        await house.http.post(CHAT, json=RESUMABLE)
        names.append(next(reversed(house.service.recordings._by_name)))
    assert (
        list(house.service.recordings._by_name) == names[-len(house.service.recordings._by_name) :]
    )
    assert 0 < len(house.service.recordings._by_name) < 5
    assert all(one._first == 1 for one in house.service.recordings._by_name.values())


@pytest.mark.parametrize("first", ["one", "two"])
async def test_a_tenant_cannot_take_what_another_needs(houses: Houses, first: str) -> None:
    house = await houses.open(
        FakeEngine(script=say("A red circle. " * 200)),
        resume_bytes=1 << 20,
        api_key=("one", "two"),
    )

    async def ask(key: str) -> str:
        await house.http.post(CHAT, json=RESUMABLE, headers={"Authorization": f"Bearer {key}"})
        return next(reversed(house.service.recordings._by_name))

    if first == "one":
        kept = await ask("one")
    for _ in range(5):
        await ask("two")
    if first == "two":
        kept = await ask("one")
    assert house.service.recordings._by_name[kept]._first == 1


async def test_a_reader_too_many_takes_the_place_of_the_first(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    async with reading(house) as first:
        port = first.client.base_url.port or 0
        readers = [first]
        tasks = [asyncio.ensure_future(first.read())]
        async with asyncio.timeout(60):
            while not house.service.recordings._by_name:
                await asyncio.sleep(0.01)
        (recording,) = house.service.recordings._by_name.values()
        for _ in range(4):
            readers.append(Reader(port))
            readers[-1].name = recording.name
            tasks.append(asyncio.ensure_future(readers[-1].read()))
            await asyncio.sleep(0.05)
        await within(tasks[0])
        go_on.set()
        await within(asyncio.gather(*tasks))
        for reader in readers[1:]:
            await reader.client.aclose()
    assert json.loads(first.events[-2][1])["error"]["code"] == "superseded"
    assert [reader.text() for reader in readers[1:]] == ["Yes No"] * 4


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_drain_waits_for_a_reader_until_its_grace_is_over(
    houses: Houses, comes_back: bool
) -> None:
    go_on = asyncio.Event()
    grace = 60 if comes_back else 0.2
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    async with reading(house) as reader:
        await reader.read(300)
        await left(house)
        house.service.recordings.grace = grace
        begun = asyncio.get_running_loop().time()
        go_on.set()
        drained = asyncio.ensure_future(house.service.drain())
        if comes_back:
            await asyncio.sleep(0.1)
            assert not drained.done()  # it is over, and nobody has read its end
            await reader.read()
            assert reader.text() == "Yes No"
        await within(drained)
    assert comes_back or asyncio.get_running_loop().time() >= begun + grace


async def test_who_comes_back_as_the_patience_ends_is_told_so(houses: Houses) -> None:
    """Between the answer to its GET and its first event the answer was given up: it ended there,
    as if that were all."""
    house = await houses.open(FakeEngine(script=in_two("Yes", asyncio.Event(), "")))
    async with reading(house) as reader:
        await reader.read(300)
        recordings = house.service.recordings
        (recording,) = recordings._by_name.values()
        stream = recordings.resume(recording.name, b"", 0, "Last-Event-ID")
        assert stream is not None
        recording._give_up()
        sent = b"".join([event async for event in stream.body_iterator])
    assert sent.endswith(b"data: [DONE]\n\n")
    assert b'"code":"client_too_slow"' in sent
    assert house.engine.aborted


async def test_the_end_of_a_drain_is_an_error_in_the_stream(houses: Houses) -> None:
    house = await houses.open(
        FakeEngine(script=in_two("Yes", asyncio.Event(), "")), drain_timeout=0.2
    )
    async with reading(house) as reader:
        await reader.read(300)
        recording = await left(house)
        back = asyncio.ensure_future(reader.read())
        await until(lambda: recording.is_read)
        await within(house.service.drain())
        await within(back)
    assert reader.is_done
    assert "shutting down" in json.loads(reader.events[-2][1])["error"]["message"]
