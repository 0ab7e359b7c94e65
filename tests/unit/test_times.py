"""How long an engine says that requests took, and what it counts, by a clock of the test's."""

import asyncio
import itertools
from types import SimpleNamespace

import msgspec
import pytest

from engine import core, streams
from engine.streams import Streams
from tests.fake_runner import GEOMETRY, Engine, crowded, request
from wire.messages import EngineOutput, EngineStats, StepReport, Times


@pytest.fixture(params=["off", "on"])
def pipelined(request: pytest.FixtureRequest) -> str:
    return request.param


class Watched(Engine):
    """Every look at the clock is a second later; remembers when outputs came, and their times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        super().__init__(**settings)
        self.now = 0.0
        self.came: dict[str, float] = {}
        self.told: dict[str, list[Times]] = {}
        self.last: dict[str, float] = {}
        monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=self.tick))

    def tick(self) -> float:
        self.now += 1
        return self.now

    def add(self, name: str, *parts: int | tuple[int, int], **options: object) -> None:
        super().add(name, *parts, **options)
        self.came[name] = self.now

    def take(self, report: StepReport) -> None:
        super().take(report)
        for output in report.outputs:
            self.last[output.id] = self.now
            if output.times is not None:
                self.told.setdefault(output.id, []).append(output.times)


def test_queue_prefill_and_decode_are_all_the_time_from_arrival_to_the_last_token(
    monkeypatch: pytest.MonkeyPatch, pipelined: str
) -> None:
    engine = Watched(monkeypatch, max_num_seqs=2, async_scheduling=pipelined)
    for name in "abcd":
        engine.add(name, 9, max_tokens=6)
    engine.add("e", 3, max_tokens=1)
    engine.finish()
    for name in "abcd":
        first, last = engine.told[name]
        assert first.decode is None
        assert (last.queue, last.prefill) == (0, 0)
        assert first.queue + first.prefill + last.decode == engine.last[name] - engine.came[name]
        assert first.prefill > 0
        assert last.decode > 0
    assert engine.told["a"][0].queue < engine.told["c"][0].queue  # which waited for a place
    (only,) = engine.told["e"]  # its first token is its last
    assert only.decode == 0
    assert only.queue + only.prefill == engine.last["e"] - engine.came["e"]


def test_a_preempted_request_is_timed_once(monkeypatch: pytest.MonkeyPatch, pipelined: str) -> None:
    engine = Watched(monkeypatch, num_kv_blocks=7, async_scheduling=pipelined)
    for name in "abc":
        engine.add(name, 7, max_tokens=8)
    engine.finish()
    assert engine.scheduler.stats.preemptions > 0
    for name in "abc":
        first, last = engine.told[name]
        assert first.queue + first.prefill + last.decode == engine.last[name] - engine.came[name]


def test_a_message_that_waited_for_the_step_to_end_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Watched(monkeypatch)
    engine.now = 100.0
    engine.core.take(*request("a", 3, max_tokens=1), 40.0)
    engine.finish()
    assert engine.told["a"][0].queue == 61


def test_an_engine_that_goes_on_behind_some_output_neither_times_nor_counts_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Watched(monkeypatch)
    original, buffers = request("a", 5, (1, 2), max_tokens=6)
    engine.core.add(msgspec.structs.replace(original, output=[1, 2]), buffers)
    engine.finish()
    assert len(engine.tokens["a"]) == 4
    assert not engine.told
    stats = engine.scheduler.stats
    assert (stats.prefix_queries, stats.vision_queries) == (0, 0)


def test_caches_are_looked_at_once_for_each_request_however_often_it_is_preempted(
    pipelined: str,
) -> None:
    engine = crowded(pipelined)
    stats = engine.scheduler.stats
    assert stats.preemptions > 0
    assert (stats.vision_queries, stats.vision_hits) == (2, 0)
    assert stats.prefix_queries == 0  # there is no such cache


def test_what_caches_had_is_a_hit() -> None:
    engine = Engine()
    for name in "ab":
        engine.add(name, (1, 2), 9, max_tokens=2)
        engine.finish()
    length = 2 * GEOMETRY.tokens_per_tile + 9
    stats = engine.scheduler.stats
    assert stats.prefix_queries == 2 * length
    assert 0 < stats.cached_tokens < length
    assert (stats.vision_queries, stats.vision_hits) == (1, 0)  # the second needed it not at all
    engine.add("c", 1, (1, 2), (1, 2), (3, 1), 1, max_tokens=2)
    engine.finish()
    stats = engine.scheduler.stats
    assert (stats.vision_queries, stats.vision_hits) == (3, 1)


def test_what_must_be_scored_is_not_looked_up() -> None:
    engine = Engine()
    engine.add("a", 20, max_tokens=2)
    engine.finish()
    engine.add("b", 20, max_tokens=2, prompt_logprobs=0)
    engine.finish()
    stats = engine.scheduler.stats
    assert (stats.prefix_queries, stats.prompt_tokens) == (20, 40)


def test_counters_of_lost_engines_stay_and_their_gauges_go() -> None:
    lost = EngineStats(running=3, blocks_used=5, steps=7, cached_tokens=11, step_seconds=0.5)
    past = lost.behind(EngineStats(steps=1, vision_hits=2))
    assert past == EngineStats(steps=8, cached_tokens=11, vision_hits=2, step_seconds=0.5)


class Clock:
    """Of the front end."""

    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(streams, "time", clock)
    return clock


class Reader:
    """One request at streams whose engine is the test."""

    def __init__(self, *, connected: bool = True) -> None:
        self.streams = Streams(lambda *_: None)
        if connected:
            self.streams.connect()

    async def ask(self, name: str = "a") -> None:
        self.task = asyncio.create_task(self._read(name))
        await asyncio.sleep(0)

    async def _read(self, name: str) -> list[EngineOutput]:
        return [output async for output in self.streams.read(*request(name, 3, max_tokens=99))]

    def say(
        self, *ids: int, name: str = "a", end: str | None = None, times: Times | None = None
    ) -> None:
        output = EngineOutput(name, list(ids), end, times=times)
        self.streams.deal(StepReport([output], EngineStats(running=1)))

    def fall_idle(self) -> None:
        self.streams.deal(StepReport([], EngineStats()))

    async def told(self) -> Times:
        """What all outputs together tell."""
        (output,) = await self.task
        assert output.times is not None
        return output.times


async def test_the_gaps_between_tokens_are_those_of_their_arrival(clock: Clock) -> None:
    reader = Reader()
    await reader.ask()
    for gap, token in zip((4.0, 0.5, 0.25, 0.25), itertools.count(1), strict=False):
        clock.now += gap
        reader.say(token)
    clock.now += 9
    reader.say(end="length")  # no token, no gap
    await reader.task
    assert (reader.streams.gaps.count, reader.streams.gaps.sum) == (3, 1.0)


async def test_of_tokens_that_come_together_each_has_its_part(clock: Clock) -> None:
    reader = Reader()
    await reader.ask()
    reader.say(1)
    clock.now += 1.0
    reader.say(2, 3, 4, 5)
    clock.now += 0.5
    reader.say(6, end="length")
    await reader.task
    assert list(reader.streams.gaps.buckets()) == [
        (bound, 0 if float(bound) < 0.25 else 4 if float(bound) < 0.5 else 5)
        for bound, _ in reader.streams.gaps.buckets()
    ]
    assert (reader.streams.gaps.count, reader.streams.gaps.sum) == (5, 1.5)


async def test_who_leaves_before_the_end_knows_how_long_its_tokens_took_to_arrive(
    clock: Clock,
) -> None:
    """However late it reads them, one by one or many at once."""
    reader = Reader()
    outputs = reader.streams.read(*request("a", 3, max_tokens=99))
    read = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0)
    reader.say(1, times=Times(1.0, 2.0))
    told = [(await read).times]
    for ids in ([2], [3, 4, 5]):
        for token in ids:
            clock.now += 2
            reader.say(token)
        clock.now += 70
        told.append((await anext(outputs)).times)
    assert told == [Times(1.0, 2.0), Times(decode=2.0), Times(decode=148.0 - 70.0)]
    await outputs.aclose()


async def test_the_time_without_an_engine_is_time_in_the_queue(clock: Clock) -> None:
    reader = Reader(connected=False)
    await reader.ask()
    clock.now += 30
    reader.streams.connect()
    clock.now += 3
    reader.say(1, times=Times(1.0, 2.0))
    reader.say(2, end="length", times=Times(decode=0.5))
    assert await reader.told() == Times(31.0, 2.0, 0.5)
    assert reader.streams.resumed == 0


async def test_a_request_whose_engine_dies_is_resumed_once_and_timed_once(clock: Clock) -> None:
    reader = Reader()
    await reader.ask()
    clock.now += 10
    reader.streams.disconnect()  # before its first token
    reader.streams.disconnect()  # nor did the next get ready
    clock.now += 20
    reader.streams.connect()
    assert reader.streams.resumed == 1
    clock.now += 3
    reader.say(*range(8), times=Times(1.0, 2.0))
    reader.streams.disconnect()  # behind as many tokens as clear it
    clock.now += 5
    reader.streams.connect()
    assert reader.streams.resumed == 2
    reader.say(2, end="length")
    assert await reader.told() == Times(31.0, 2.0, 5.0)  # the pause is a part of it
    assert (reader.streams.gaps.count, reader.streams.gaps.sum) == (1, 5.0)


async def test_a_request_that_is_sent_again_behind_its_trial_is_resumed_once() -> None:
    reader = Reader()
    await reader.ask("a")
    await reader.ask("b")
    reader.streams.disconnect()
    reader.streams.connect()
    for name in "ab":  # each is tried alone
        reader.say(*range(8), name=name)
        reader.fall_idle()
    assert reader.streams.resumed == 2
    for name in "ab":
        reader.say(1, name=name, end="length")
    await reader.task
    assert reader.streams.resumed == 2
