"""How outputs reach their readers, and the engine client without a process."""

import asyncio
import contextlib
import functools
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from engine.inproc import InprocEngine
from engine.plan import StepPlan
from engine.streams import Streams
from tests.fake_runner import FakeRunner, alone, request
from wire.errors import ClientTooSlow, EngineFailed, Unavailable
from wire.logs import about, request_id
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Progress,
    PromptLogprobs,
    StepReport,
    TokenLogprobs,
)
from wire.settings import EngineSettings

DEADLINE = 60.0
SETTINGS = EngineSettings(block_size=4)


class House:
    """Streams whose engine is the test. ``sent`` is what the engine was sent."""

    def __init__(self, *, connected: bool = True) -> None:
        self.sent: list[EngineRequest | Abort] = []
        self.streams = Streams(lambda message, _: self.sent.append(message))
        if connected:
            self.streams.connect()

    async def ask(self, *names: str) -> list[asyncio.Task[list[int]]]:
        """Open requests; a task ends with all tokens of its request."""
        tasks = [asyncio.create_task(self._read(name)) for name in names]
        await asyncio.sleep(0)
        return tasks

    async def wait_sent(self) -> None:
        async with asyncio.timeout(DEADLINE):
            while not self.sent:
                await asyncio.sleep(0)

    async def _read(self, name: str) -> list[int]:
        reader = self.streams.read(*request(name, 3, max_tokens=9))
        return [token async for output in reader for token in output.token_ids]

    def say(self, name: str, *token_ids: int, end: str | None = None) -> None:
        self.report(EngineOutput(name, list(token_ids), end))

    def report(self, *outputs: EngineOutput, running: int = 1) -> None:
        self.streams.deal(StepReport(list(outputs), EngineStats(running=running)))

    def take_sent(self) -> list[str]:
        """Names of what was sent since the last call, in order; an abort's with a minus."""
        sent, self.sent = self.sent, []
        return [f"-{m.ids[0]}" if isinstance(m, Abort) else m.id for m in sent]


async def first(stream: AsyncIterator[EngineOutput]) -> EngineOutput:
    return await asyncio.wait_for(anext(stream), DEADLINE)


def untimed(output: EngineOutput) -> EngineOutput:
    return msgspec.structs.replace(output, times=None)


async def result(task: asyncio.Task[list[int]]) -> list[int]:
    return await asyncio.wait_for(task, DEADLINE)


async def leave(task: asyncio.Task[list[int]]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_each_output_goes_to_its_own_reader() -> None:
    house = House()
    a, b = await house.ask("a", "b")
    assert house.take_sent() == ["a", "b"]
    house.report(EngineOutput("b", [2], "stop"), EngineOutput("a", [1], "length"))
    house.say("gone", 3)
    assert [await result(a), await result(b)] == [[1], [2]]


async def test_a_slow_reader_loses_nothing() -> None:
    house = House()
    (reader,) = await house.ask("a")
    for token in range(5):
        house.say("a", token)
    house.say("a", 5, end="length")
    assert await result(reader) == [0, 1, 2, 3, 4, 5]
    assert house.take_sent() == ["a"]


async def test_a_slow_reader_finds_all_its_outputs_as_one() -> None:
    house = House()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    likely = [TokenLogprobs(-1.0 * n, []) for n in range(3)]
    prompt = [PromptLogprobs(-0.5, 1, [])]
    house.report(EngineOutput("a", [1], None, None, 2, None, likely[:1], prompt, [0.5, 0.0]))
    house.report(EngineOutput("a", [2], None, None, 3, None, likely[1:2], None, [0.25, 1.0]))
    house.report(EngineOutput("a", [3], "stop", 3, 3, None, likely[2:], None, None))
    whole = EngineOutput("a", [1, 2, 3], "stop", 3, 3, None, likely, prompt, [0.75, 1.0])
    assert untimed(await reading) == whole


async def test_what_waits_for_a_reader_is_joined_before_it_comes() -> None:
    house = House()
    (reader,) = await house.ask("a")
    for token in range(10_000):
        house.say("a", token)
    assert len(house.streams._open["a"].outputs) < 100
    house.say("a", 0, end="length")
    assert await result(reader) == [*range(10_000), 0]


@pytest.mark.parametrize("logprobs", [False, True])
async def test_a_reader_that_leaves_too_much_unread_gets_an_error_behind_it(logprobs: bool) -> None:
    house = House()
    house.streams = Streams(lambda message, _: house.sent.append(message), max_unread=1000)
    house.streams.connect()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    likely = [TokenLogprobs(-1.0, [(1, -1.0)] * 9)] if logprobs else None
    for token in range(2000):
        house.report(EngineOutput("a", [token], logprobs=likely))
    kept = (await reading).token_ids
    assert kept == list(range(len(kept)))
    each = 11 if logprobs else 1  # a token and its log-probabilities
    assert 1000 < len(kept) * each <= 1000 + 64 * each  # looked at once in so many outputs
    with pytest.raises(ClientTooSlow):
        await first(reader)
    assert house.take_sent() == ["a", "-a"]
    assert not house.streams.at_work


@pytest.mark.parametrize("end", ["error", "stuck"])
async def test_a_slow_reader_finds_what_came_before_an_error(end: str) -> None:
    house = House()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    house.say("a", 1)
    house.say("a", 2)
    house.say("a", 3, end=end)
    assert untimed(await reading) == EngineOutput("a", [1, 2])
    assert untimed(await first(reader)) == EngineOutput("a", [3], end)


async def test_a_reader_that_leaves_early_aborts_once() -> None:
    house = House()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    house.say("a", 1)
    await reading
    await reader.aclose()
    await reader.aclose()
    assert house.take_sent() == ["a", "-a"]


async def test_a_failure_comes_after_the_outputs_that_arrived_and_needs_no_abort() -> None:
    house = House()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    house.say("a", 1)
    house.streams.fail(lambda: EngineFailed("gone"))
    assert (await reading).token_ids == [1]
    with pytest.raises(EngineFailed):
        await first(reader)
    assert house.take_sent() == ["a"]


async def test_log_lines_about_a_request_have_the_id_of_who_asked() -> None:
    seen: list[tuple[str, str]] = []

    class Sink(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((request_id.get(), record.getMessage()))

    sink = Sink()
    logging.getLogger("engine.streams").addHandler(sink)
    try:
        house = House()
        with about("mine"):
            (reader,) = await house.ask("a")
        for _ in range(2):  # of the second death, alone, it is guilty
            house.streams.disconnect()
            house.streams.connect()
        with pytest.raises(EngineFailed):
            await result(reader)
    finally:
        logging.getLogger("engine.streams").removeHandler(sink)
    assert seen == [("mine", "request=a is given up: engines die of it")]


async def test_what_arrived_while_a_reader_was_busy_comes_before_the_failure_too() -> None:
    house = House()
    reader = house.streams.read(*request("a", 3))
    reading = asyncio.create_task(first(reader))
    await house.wait_sent()
    house.say("a", 1)
    assert (await reading).token_ids == [1]
    house.say("a", 2)
    house.streams.fail(lambda: EngineFailed("gone"))
    assert (await first(reader)).token_ids == [2]
    with pytest.raises(EngineFailed):
        await first(reader)


@pytest.mark.parametrize("end", ["fail", "disconnect"])
async def test_a_request_that_had_its_last_output_does_not_fail_nor_come_again(end: str) -> None:
    house = House()
    (reader,) = await house.ask("a")
    house.say("a", 1, end="stop")
    if end == "fail":
        house.streams.fail(lambda: EngineFailed("gone"))
    else:
        house.streams.disconnect()
        house.streams.connect()
    assert await result(reader) == [1]
    assert house.take_sent() == ["a"]


async def test_all_requests_are_ended_at_once_and_the_engine_is_told_of_those_it_has() -> None:
    house = House()
    a, b = await house.ask("a", "b")
    house.say("a", 1)
    house.take_sent()
    assert house.streams.abort_all(lambda: Unavailable("ended")) == 2
    (abort,) = house.sent
    assert isinstance(abort, Abort)
    assert sorted(abort.ids) == ["a", "b"]
    for task in (a, b):
        with pytest.raises(Unavailable, match="ended"):
            await result(task)
    assert len(house.sent) == 1  # they do not abort once more
    house.take_sent()
    (again,) = await house.ask("a")
    house.say("a", 7, end="stop")
    assert await result(again) == [7]


async def test_one_request_is_ended_by_its_id_whether_the_engine_has_it_or_not() -> None:
    for connected in (True, False):
        house = House(connected=connected)
        a, b = await house.ask("a", "b")
        house.take_sent()
        assert house.streams.abort("a", Unavailable("ended"))
        assert not house.streams.abort("a", Unavailable("ended twice"))
        with pytest.raises(Unavailable, match=r"ended$"):
            await result(a)
        assert house.take_sent() == (["-a"] if connected else [])
        house.streams.connect()
        house.say("b", 7, end="stop")
        assert await result(b) == [7]


async def test_requests_that_wait_for_an_engine_are_ended_without_it() -> None:
    house = House(connected=False)
    (a,) = await house.ask("a")
    assert house.streams.abort_all(lambda: Unavailable("ended")) == 1
    with pytest.raises(Unavailable):
        await result(a)
    house.streams.connect()
    assert not house.sent


async def test_an_id_cannot_be_open_twice() -> None:
    house = House()
    (reader,) = await house.ask("a")
    with pytest.raises(ValueError, match="is open"):
        await first(house.streams.read(*request("a", 3)))
    house.say("a", 1, end="stop")
    assert await result(reader) == [1]


async def test_after_a_death_a_request_is_sent_again_with_what_it_had() -> None:
    house = House()
    (reader,) = await house.ask("a")
    house.say("a", 1)
    house.say("a", 2, 3)
    house.streams.disconnect()
    assert not house.streams.at_work
    house.streams.connect()
    original, again = house.sent
    assert again == msgspec.structs.replace(original, output=[1, 2, 3])
    house.say("a", 4, end="length")
    assert await result(reader) == [1, 2, 3, 4]


async def test_requests_wait_for_the_first_connection_and_those_that_left_are_not_sent() -> None:
    house = House(connected=False)
    a, b = await house.ask("a", "b")
    await leave(a)
    assert house.take_sent() == []
    house.streams.connect()
    assert house.take_sent() == ["b"]
    await leave(b)


async def test_a_request_that_has_outgrown_a_smaller_successor_ends_with_its_length() -> None:
    house = House()
    grown, fits, fresh = await house.ask("grown", "fits", "fresh")
    house.say("grown", 1, 2, 3)
    house.say("fits", 1, 2)
    house.take_sent()
    house.streams.disconnect(["fits"])
    house.streams.connect(6)  # prompts of three tokens
    assert house.take_sent() == ["fits"]
    house.say("fits", 4, end="length")
    assert house.take_sent() == ["fresh"]
    house.say("fresh", 5, end="stop")
    assert [await result(reader) for reader in (grown, fits, fresh)] == [[1, 2, 3], [1, 2, 4], [5]]


async def test_a_suspect_that_has_outgrown_its_engine_does_not_hold_up_the_others() -> None:
    house = House()
    grown, other = await house.ask("grown", "other")
    house.say("grown", 1, 2, 3)
    house.take_sent()
    house.streams.disconnect(["grown"])
    house.streams.connect(6)
    assert house.take_sent() == ["other"]
    house.say("other", 5, end="stop")
    assert [await result(reader) for reader in (grown, other)] == [[1, 2, 3], [5]]


async def test_any_number_of_suspects_may_have_outgrown_their_engine() -> None:
    house = House()
    names = [f"{number}" for number in range(sys.getrecursionlimit())]
    readers = await house.ask(*names)
    house.report(*(EngineOutput(name, [1, 2, 3]) for name in names))
    house.streams.disconnect()
    house.streams.connect(6)
    for reader in readers:
        assert await result(reader) == [1, 2, 3]


TRIAL = range(8)  # tokens that end a first trial well


async def test_suspects_are_sent_one_at_a_time_before_anything_else() -> None:
    house = House()
    readers = await house.ask("a", "b", "c", "d")
    house.streams.disconnect()
    house.take_sent()
    house.streams.connect()
    readers += await house.ask("new")
    assert house.take_sent() == ["a"]
    house.say("a", *TRIAL[:-1])
    assert house.take_sent() == []
    house.say("a", 7)
    assert house.take_sent() == ["-a"]
    house.say("a", 8)  # was on its way when a had to make room
    assert house.take_sent() == []
    assert house.streams.at_work
    house.report(running=0)
    assert house.take_sent() == ["b"]
    await leave(readers[1])
    assert house.take_sent() == ["-b", "c"]
    house.say("c", end="error")
    assert house.take_sent() == ["d"]
    house.say("d", *TRIAL)
    assert [again.output for again in house.sent] == [[], [*TRIAL, 8]]
    assert house.take_sent() == ["new", "a"]
    assert house.streams.at_work
    for reader in readers:
        await leave(reader)


async def test_a_suspect_that_ends_while_it_makes_room_is_not_sent_again() -> None:
    house = House()
    a, b = await house.ask("a", "b")
    house.streams.disconnect()
    house.streams.connect()
    house.say("a", *TRIAL)
    house.report(EngineOutput("a", [9], "stop"), running=0)
    assert house.take_sent()[-1] == "b"
    house.say("b", *TRIAL)
    assert house.take_sent() == []
    assert await result(a) == [*TRIAL, 9]
    await leave(b)


async def test_who_is_on_trial_at_a_death_fails_and_clears_the_others() -> None:
    house = House()
    a, b, c = await house.ask("a", "b", "c")
    house.streams.disconnect()
    house.streams.connect()
    house.say("a", *TRIAL)
    house.report(running=0)
    house.streams.disconnect()
    with pytest.raises(EngineFailed):
        await result(b)
    house.take_sent()
    house.streams.connect()
    assert house.take_sent() == ["a", "c"]
    house.say("a", 9, end="stop")
    house.say("c", 9, end="stop")
    assert [await result(a), await result(c)] == [[*TRIAL, 9], [9]]


@pytest.mark.parametrize("kills_after", [1, 20, 60])
async def test_what_kills_late_fails_alone(kills_after: int) -> None:
    """An engine that dies when "bad" has made so many tokens since it was sent; six innocents."""
    house = House()
    names = ["a", "b", "c", "bad", "d", "e", "f"]
    readers = dict(zip(names, await house.ask(*names), strict=True))
    made: dict[str, int] = {}
    deaths = 0
    while not readers["bad"].done():
        for name in house.take_sent():
            made.pop(name.removeprefix("-"), None)
            if not name.startswith("-"):
                made[name] = 0
        if not made:
            house.report(running=0)
        for name in list(made):
            if name not in made or readers[name].done():
                continue
            made[name] += 1
            house.say(name, made[name])
            if name == "bad" and made[name] == kills_after:
                deaths += 1
                made.clear()
                house.take_sent()
                house.streams.disconnect()
                house.streams.connect()
                break
        await asyncio.sleep(0)
    with pytest.raises(EngineFailed):
        await result(readers.pop("bad"))
    assert deaths <= 3
    assert not any(reader.done() for reader in readers.values())
    for reader in readers.values():
        await leave(reader)


async def test_nobody_is_convicted_while_the_engine_may_still_compute_another() -> None:
    house = House()
    a, b = await house.ask("a", "b")
    house.streams.disconnect()
    house.streams.connect()
    house.say("a", *TRIAL)
    house.streams.disconnect()
    house.streams.connect()
    assert house.take_sent()[-1] == "a"
    house.say("a", *range(64))
    house.report(running=0)
    for name, reader in (("a", a), ("b", b)):
        house.say(name, 9, end="stop")
        assert (await result(reader))[-1] == 9


async def test_only_those_the_engine_names_are_suspects() -> None:
    house = House()
    a, b, c = await house.ask("a", "b", "c")
    house.streams.disconnect(["b"])
    house.take_sent()
    house.streams.connect()
    assert house.take_sent() == ["b"]
    house.say("b", *TRIAL)
    assert house.take_sent() == ["a", "c"]
    for reader in (a, b, c):
        await leave(reader)


async def test_nobody_is_blamed_for_what_one_did_that_has_left() -> None:
    house = House()
    a, b = await house.ask("a", "b")
    house.streams.disconnect()
    house.streams.connect()
    await leave(a)
    house.take_sent()
    house.streams.disconnect(["a"])
    house.streams.connect()
    assert house.take_sent() == ["b"]
    assert not b.done()
    await leave(b)


async def test_suspicion_is_forgotten_after_many_tokens() -> None:
    """Deaths that have nothing to do with it, hours apart, are not held against a long answer."""
    house = House()
    (a,) = await house.ask("a")
    for _ in range(5):
        house.streams.disconnect()
        house.streams.connect()
        house.say("a", *range(256))
    house.say("a", 1, end="stop")
    assert len(await result(a)) == 5 * 256 + 1


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

    def begin(self, plan: StepPlan) -> None:
        self.entered.release()
        assert self.gate.acquire(timeout=DEADLINE)
        super().begin(plan)


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


class PacedRunner(FakeRunner):
    """Is at work for a while."""

    def begin(self, plan: StepPlan) -> None:
        time.sleep(0.02)
        super().begin(plan)


async def test_stopping_ends_open_streams() -> None:
    async with inproc(PacedRunner) as client:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        stream = client.submit(*request("a", 4, max_tokens=200))
        await first(stream)
        await asyncio.wait_for(client.stop(), DEADLINE)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
