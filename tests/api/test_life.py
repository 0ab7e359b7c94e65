"""Starting, full, draining, failed; and clients that leave. Driven over plain ASGI messages where
the moment matters."""

import asyncio
import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from server import lifecycle
from server.announce import announce
from tests.api.conftest import House, Houses
from tests.fake_engine import EOS, FakeEngine, make_ready
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineOutput, Progress

HELLO = {"messages": [{"role": "user", "content": "Hello!"}]}


class Client:
    """One request over ASGI whose answer can be watched, and which can leave."""

    def __init__(self, house: House, body: dict[str, Any] | None) -> None:
        self.received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if body is None:
            self.send(b"{", more=True)  # and nothing comes
        else:
            self.send(json.dumps(body).encode(), more=False)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.ensure_future(
            house.app(scope, self._to_server.get, self.received.put)  # type: ignore[arg-type]
        )

    def send(self, body: bytes, *, more: bool) -> None:
        self._to_server.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self._to_server.put_nowait({"type": "http.disconnect"})

    async def read_until(self, text: bytes) -> None:
        while text not in (await self.received.get()).get("body", b""):
            pass


async def within(work: Any) -> Any:
    """Nothing in these tests may wait for ever."""
    return await asyncio.wait_for(work, 60)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


def stuck(engine: FakeEngine) -> asyncio.Event:
    """Make the engine write one word and then wait for the returned event."""
    go_on = asyncio.Event()
    engine.script = lambda request: [
        encode_rendered("Yes"),
        go_on,
        encode_rendered(" No"),
        EngineOutput(request.id, [EOS], "stop", EOS),
    ]
    return go_on


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_work(house: House, stream: bool) -> None:
    stuck(house.engine)
    client = Client(house, HELLO | {"stream": stream})
    if stream:
        await within(client.read_until(b"Yes"))
    else:
        while not house.engine.requests:
            await asyncio.sleep(0)
    client.leave()
    await within(house.engine.abort_seen.wait())
    await within(client.task)
    assert house.engine.aborted == [house.engine.requests[0].id]
    assert house.service.gate.idle.is_set()


async def test_a_client_that_leaves_early_ends_the_fetching_of_its_pictures(house: House) -> None:
    house.media.gate.clear()
    part = {"type": "image_url", "image_url": "data:x"}
    client = Client(house, {"messages": [{"role": "user", "content": [part, part]}]})
    while len(house.media.parts) < 2:
        await asyncio.sleep(0)
    client.leave()
    await within(client.task)
    assert house.media.cancelled == 2
    assert not house.engine.requests
    assert house.service.gate.idle.is_set()


async def test_of_one_request_only_a_few_pictures_are_on_their_way(house: House) -> None:
    house.media.gate.clear()
    part = {"type": "image_url", "image_url": "data:x"}
    asked = asyncio.ensure_future(house.ask(messages=[{"role": "user", "content": [part] * 4}]))
    while len(house.media.parts) < 3:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(house.media.parts) == 3
    house.media.gate.set()
    assert (await within(asked)).status_code == 200
    assert len(house.media.parts) == 4


@pytest.mark.parametrize(("context", "loaded"), [(12, 0), (14, 3)])
async def test_pictures_that_cannot_fit_are_refused_before_all_are_decoded(
    houses: Houses, context: int, loaded: int
) -> None:
    """Four pictures of two tiles of three tokens each."""
    house = await houses.open(FakeEngine(make_ready(max_model_len=context)))
    house.media.gate.clear()
    part = {"type": "image_url", "image_url": "data:x"}
    body = {"messages": [{"role": "user", "content": [part] * 4}]}
    asked = asyncio.ensure_future(house.ask(**body))
    for _ in range(50):
        await asyncio.sleep(0)
    house.media.gate.set()
    answer = await within(asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert str(context) in answer.json()["error"]["message"]
    assert len(house.media.parts) == loaded


async def test_one_bad_picture_ends_the_fetching_of_the_others(house: House) -> None:
    house.media.gate.clear()
    content = [{"type": "image_url", "image_url": url} for url in ("data:x", "data:bad")]
    answer = await within(house.ask(messages=[{"role": "user", "content": content}]))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[1].image_url.url"
    assert house.media.cancelled == 1


async def test_silence_is_filled_with_comments(houses: Houses) -> None:
    house = await houses.open(keep_alive_interval=0.1)
    go_on = asyncio.Event()
    house.engine.script = lambda _: [go_on]
    client = Client(house, HELLO | {"stream": True})
    start = await within(client.received.get())
    assert start["status"] == 200  # the headers do not wait for the first token
    for _ in range(2):
        assert (await within(client.received.get()))["body"] == b": keep-alive\n\n"
    client.leave()
    await within(client.task)
    assert house.engine.aborted


async def test_more_than_the_permitted_requests_are_told_to_come_back(houses: Houses) -> None:
    house = await houses.open(max_concurrent_requests=2)
    go_on = stuck(house.engine)
    running = [asyncio.ensure_future(house.ask(stream=stream)) for stream in (True, False)]
    while len(house.engine.requests) < 2:
        await asyncio.sleep(0)
    refused = await house.ask()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "too_many_requests"
    go_on.set()
    for answer in await within(asyncio.gather(*running)):
        assert answer.status_code == 200
    assert (await within(house.ask())).status_code == 200


async def test_the_start_says_what_the_sandbox_lacks(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    await announce(house.service, "127.0.0.1", 8000)
    assert "sandbox" not in capsys.readouterr().err
    house.media.missing = ["landlock", "seccomp"]
    await announce(house.service, "127.0.0.1", 8000)
    said = capsys.readouterr().err
    assert "WARNING: pictures are decoded without" in said
    assert "landlock, seccomp" in said


@pytest.mark.parametrize("terminal", [True, False])
async def test_loading_is_shown_with_its_rate_and_as_a_bar_on_a_terminal(
    houses: Houses, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    console = io.StringIO()
    monkeypatch.setattr(console, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setenv("TERM", "xterm")
    engine = FakeEngine()
    engine.load.clear()
    house = await houses.open(engine, wait=False)
    engine.progress = Progress("weights", 3_000_000_000, 6_000_000_000)
    telling = asyncio.ensure_future(announce(house.service, "127.0.0.1", 8000))
    if terminal:
        await until(lambda: "3.0/6.0 GB" in console.getvalue())
    engine.load.set()
    await within(telling)
    assert "  weights: 6.00 GB in " in console.getvalue()
    assert ("/6.0 GB" in console.getvalue()) == terminal


async def test_while_it_loads_it_lives_but_is_not_ready(houses: Houses) -> None:
    engine = FakeEngine()
    engine.load.clear()
    house = await houses.open(engine, wait=False)
    assert (await house.http.get("/live")).status_code == 200
    for path in ("/started", "/ready", "/health"):
        answer = await house.http.get(path)
        assert answer.status_code == 503
        assert answer.json()["reason"] == "loading the model"
        assert answer.json()["progress"] == {"stage": "weights", "done": 1, "total": 2}
    for answer in (await house.ask(), await house.http.get("/v1/models")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["type"] == "service_unavailable"
    engine.load.set()
    await within(house.service.settled.wait())
    assert (await house.http.get("/ready")).json() == {"status": "ready"}
    assert (await house.http.get("/started")).json() == {"status": "started"}
    assert house.media.geometry == engine._facts.geometry
    assert (await house.ask()).status_code == 200


async def test_an_engine_that_starts_again_makes_it_unready_meanwhile(house: House) -> None:
    house.engine.state = "starting"
    answer = await house.http.get("/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "the engine is starting again")
    assert (await house.http.get("/started")).status_code == 200
    assert (await house.ask()).status_code == 503
    house.engine.state = "ready"
    assert (await house.http.get("/ready")).status_code == 200


async def test_the_limits_are_those_of_the_engine_that_runs(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "WATCH_INTERVAL", 0.0)
    engine = house.engine
    engine.state, engine.load = "starting", asyncio.Event()
    engine.state, engine.ready = "ready", make_ready(max_model_len=20)
    answer = await house.ask()
    assert answer.status_code == 503  # not yet known here
    engine._facts = engine.ready
    engine.load.set()
    async with asyncio.timeout(60):
        while house.service.state != "ready":
            await asyncio.sleep(0.01)
    assert (await house.http.get("/v1/models")).json()["data"][0]["max_model_len"] == 20
    refused = await house.ask(max_tokens=100)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    await house.ask()
    assert engine.requests[-1].sampling.max_tokens < 20


async def test_a_model_that_cannot_be_loaded_is_a_failure(houses: Houses) -> None:
    engine = FakeEngine()
    engine.fails_to_load = True
    house = await houses.open(engine)
    assert house.service.failed.is_set()
    for path in ("/started", "/ready"):
        answer = await house.http.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert (await house.ask()).status_code == 503


async def test_a_checkpoint_without_a_usable_tokenizer_is_a_failure(houses: Houses) -> None:
    (houses.folder / "tokenizer.json").write_text("{}")
    house = await houses.open()
    assert house.service.failed.is_set()
    assert str(houses.folder) not in (await house.http.get("/ready")).text


async def test_a_drain_lets_running_work_finish_and_refuses_new_work(house: House) -> None:
    go_on = stuck(house.engine)
    client = Client(house, HELLO | {"stream": True})
    await within(client.read_until(b"Yes"))
    drained = asyncio.ensure_future(house.service.drain())
    await asyncio.sleep(0)
    assert (await house.http.get("/ready")).status_code == 503
    for path in ("/live", "/started"):
        assert (await house.http.get(path)).status_code == 200
    refused = await house.ask()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert not drained.done()
    go_on.set()
    await within(client.read_until(b" No"))
    await within(client.task)
    await within(drained)


async def test_what_runs_at_the_end_of_a_drain_is_told_so(houses: Houses) -> None:
    house = await houses.open(drain_timeout=0.05)
    stuck(house.engine)
    client = Client(house, HELLO | {"stream": True})
    await within(client.read_until(b"Yes"))
    await within(house.service.drain())
    await within(client.read_until(b'data: {"error":{"message":"The server is shutting down."'))
    await within(client.task)
    assert house.service.gate.idle.is_set()
    assert not house.service.failed.is_set()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/internvl/preview"])
async def test_who_waits_for_pictures_at_the_end_of_a_drain_is_told_so(
    houses: Houses, path: str
) -> None:
    house = await houses.open(drain_timeout=0.05)
    house.media.gate.clear()
    asked = asyncio.ensure_future(house.http.post(path, json=with_picture()))
    while not house.media.parts:
        await asyncio.sleep(0)
    await within(house.service.drain())
    answer = await within(asked)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "The server is shutting down."
    assert house.media.cancelled == 1


async def test_whose_question_has_not_arrived_at_the_end_of_a_drain_is_told_so(
    houses: Houses,
) -> None:
    house = await houses.open(drain_timeout=0.05)
    client = Client(house, None)
    while house.service.gate.idle.is_set():
        await asyncio.sleep(0)
    await within(house.service.drain())
    assert (await within(client.received.get()))["status"] == 503
    await within(client.task)


def with_picture(detail: str = "high") -> dict[str, Any]:
    """A streamed question about a picture: two tiles of 48 bytes, or one at detail "low"."""
    picture = {"type": "image_url", "image_url": {"url": "http://here/1", "detail": detail}}
    return {"messages": [{"role": "user", "content": [picture]}], "stream": True}


async def test_tiles_are_bounded_over_all_open_answers(
    houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "TILE_TIMEOUT", 0)
    most = 13 * 48  # what a picture may have before it is decoded
    house = await houses.open(request_tile_bytes=most + 48)
    metric = "internvl_request_tile_bytes"
    go_on = stuck(house.engine)
    small = Client(house, with_picture("low"))
    await within(small.read_until(b"Yes"))
    assert f"{metric} 48.0" in (await house.http.get("/metrics")).text
    large = Client(house, with_picture())
    await within(large.read_until(b"Yes"))
    assert f"{metric} 144.0" in (await house.http.get("/metrics")).text
    refused = await house.ask(**with_picture())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "5"
    assert refused.json()["error"]["code"] == "too_many_pictures"
    assert refused.json()["error"]["param"] == "messages"
    text = Client(house, HELLO | {"stream": True})  # has no tiles
    await within(text.read_until(b"Yes"))
    small.leave()
    await within(small.task)
    assert f"{metric} 96.0" in (await house.http.get("/metrics")).text
    go_on.set()
    for client in (large, text):
        await within(client.task)
    assert (await house.ask(**with_picture())).status_code == 200
    assert f"{metric} 0.0" in (await house.http.get("/metrics")).text


async def test_a_refused_picture_gives_its_room_back(house: House) -> None:
    bad = {"type": "image_url", "image_url": {"url": "http://here/bad"}}
    answer = await house.ask(messages=[{"role": "user", "content": [bad]}])
    assert answer.status_code == 400
    assert "internvl_request_tile_bytes 0.0" in (await house.http.get("/metrics")).text
