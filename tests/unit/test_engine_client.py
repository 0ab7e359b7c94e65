"""How outputs reach their readers, and the engine client without a process."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from engine.client import Streams
from engine.inproc import InprocEngine
from engine.plan import StepPlan, StepResult
from tests.fake_runner import FakeRunner, alone, request
from wire.errors import EngineFailed, Unavailable
from wire.messages import Abort, EngineOutput, Progress
from wire.settings import EngineSettings

DEADLINE = 10.0
SETTINGS = EngineSettings(block_size=4)


class Sent:
    """What a client sends, recorded."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def __call__(self, message: object, buffers: object) -> None:
        self.messages.append(message)

    async def wait(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while len(self.messages) < count:
                await asyncio.sleep(0)


async def first(stream: AsyncIterator[EngineOutput]) -> EngineOutput:
    return await asyncio.wait_for(anext(stream), DEADLINE)


async def test_each_output_goes_to_its_own_reader() -> None:
    streams, sent = Streams(), Sent()
    readers = {name: streams.read(sent, request(name, 3)[0], ()) for name in "ab"}
    reading = {name: asyncio.create_task(first(reader)) for name, reader in readers.items()}
    await sent.wait(2)
    assert [message.id for message in sent.messages] == ["a", "b"]
    streams.deal([EngineOutput("b", [2]), EngineOutput("a", [1]), EngineOutput("gone", [3])])
    assert [(await reading[name]).token_ids for name in "ab"] == [[1], [2]]
    for reader in readers.values():
        await reader.aclose()


async def test_a_slow_reader_loses_nothing() -> None:
    streams, sent = Streams(), Sent()
    reader = streams.read(sent, request("a", 3)[0], ())
    reading = asyncio.create_task(first(reader))
    await sent.wait(1)
    for token in range(5):
        streams.deal([EngineOutput("a", [token])])
    streams.deal([EngineOutput("a", [5], "length")])
    tokens = [(await reading).token_ids[0]]
    tokens += [output.token_ids[0] async for output in reader]
    assert tokens == [0, 1, 2, 3, 4, 5]
    assert len(sent.messages) == 1


async def test_a_reader_that_leaves_early_aborts_once() -> None:
    streams, sent = Streams(), Sent()
    reader = streams.read(sent, request("a", 3)[0], ())
    reading = asyncio.create_task(first(reader))
    await sent.wait(1)
    streams.deal([EngineOutput("a", [1])])
    await reading
    await reader.aclose()
    await reader.aclose()
    assert sent.messages[1:] == [Abort(["a"])]


async def test_a_failure_comes_after_the_outputs_that_arrived_and_needs_no_abort() -> None:
    streams, sent = Streams(), Sent()
    reader = streams.read(sent, request("a", 3)[0], ())
    reading = asyncio.create_task(first(reader))
    await sent.wait(1)
    streams.deal([EngineOutput("a", [1])])
    streams.fail(lambda: EngineFailed("gone"))
    assert (await reading).token_ids == [1]
    with pytest.raises(EngineFailed):
        await first(reader)
    assert len(sent.messages) == 1


async def test_a_request_that_had_its_last_output_does_not_fail() -> None:
    streams, sent = Streams(), Sent()
    reader = streams.read(sent, request("a", 3)[0], ())
    reading = asyncio.create_task(first(reader))
    await sent.wait(1)
    streams.deal([EngineOutput("a", [1], "stop")])
    streams.fail(lambda: EngineFailed("gone"))
    assert (await reading).finish_reason == "stop"
    with pytest.raises(StopAsyncIteration):
        await first(reader)


async def test_an_id_cannot_be_open_twice() -> None:
    streams, sent = Streams(), Sent()
    reader = streams.read(sent, request("a", 3)[0], ())
    reading = asyncio.create_task(first(reader))
    await sent.wait(1)
    with pytest.raises(ValueError, match="is open"):
        await first(streams.read(sent, request("a", 3)[0], ()))
    streams.deal([EngineOutput("a", [1], "stop")])
    assert (await reading).token_ids == [1]
    await reader.aclose()


# InprocEngine


@contextlib.asynccontextmanager
async def inproc(
    make_runner: Callable[..., FakeRunner] = FakeRunner,
) -> AsyncIterator[InprocEngine]:
    client = InprocEngine(SETTINGS, make_runner)
    await client.start()
    try:
        yield client
    finally:
        await asyncio.wait_for(client.stop(), DEADLINE)
    assert client.state == "stopped"


async def tokens(client: InprocEngine, name: str, *parts: object, **options: Any) -> list[int]:
    stream = client.submit(*request(name, *parts, **options))
    return [token async for output in stream for token in output.token_ids]


async def test_requests_in_process_get_the_tokens_they_get_alone() -> None:
    async with inproc() as client:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert client.progress == Progress("load", 1, 1)
        got = await asyncio.gather(
            *(tokens(client, f"r{i}", 2 + i, (i % 2, 2), seed=i) for i in range(5))
        )
        assert got == [alone(2 + i, (i % 2, 2), seed=i) for i in range(5)]
        assert await tokens(client, "later", 4) == alone(4)


class GatedRunner(FakeRunner):
    """Each step waits until the test lets it go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def execute(self, plan: StepPlan) -> StepResult:
        self.entered.release()
        assert self.gate.acquire(timeout=DEADLINE)
        return super().execute(plan)


async def test_leaving_while_a_step_runs_frees_everything() -> None:
    runners: list[GatedRunner] = []

    def make(*args: Any) -> GatedRunner:
        runners.append(GatedRunner(*args))
        return runners[0]

    async with inproc(make) as client:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        reader = asyncio.create_task(tokens(client, "a", 4, max_tokens=100))
        assert await asyncio.to_thread(runners[0].entered.acquire, timeout=DEADLINE)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        runners[0].gate.release()
        assert await asyncio.to_thread(runners[0].entered.acquire, timeout=DEADLINE)
        assert runners[0].rows.keys() == {"a"}
        runners[0].gate.release(100)
        await tokens(client, "b", 4, max_tokens=2)
        assert [plan.removed for plan in runners[0].plans[:3]] == [[], ["a"], []]


async def test_a_step_that_fails_fails_every_stream_and_the_engine() -> None:
    async with inproc(functools.partial(FakeRunner, fail_at=2)) as client:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        results = await asyncio.wait_for(
            asyncio.gather(
                *(tokens(client, name, 4, max_tokens=50) for name in "ab"), return_exceptions=True
            ),
            DEADLINE,
        )
        assert [type(result) for result in results] == [EngineFailed] * 2
        assert client.state == "failed"
        with pytest.raises(Unavailable):
            await tokens(client, "c", 4)


async def test_a_load_that_fails_is_told_to_those_who_wait() -> None:
    def fail(*_: object) -> FakeRunner:
        raise OSError("no such folder")

    async with inproc(fail) as client:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(client.wait_ready(), DEADLINE)


async def test_stopping_ends_open_streams() -> None:
    async with inproc() as client:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        stream = client.submit(*request("a", 4, max_tokens=200))
        await first(stream)
        await asyncio.wait_for(client.stop(), DEADLINE)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
