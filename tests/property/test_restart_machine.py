"""Random traffic through engines that die, as the front end sees it.

Streams, a core and a runner stand in one process, and between them what a socket would hold:
messages the engine has not read, reports the front end has not read. An engine is killed at any
point between, with a step under way where steps are pipelined; what it had not read is lost, and
of what it had said the last part. Some requests are deadly: every engine dies that draws a
certain token of theirs.

In the end every request has ended exactly once: the deadly with an error of their own, the others
with the tokens they get alone, each once, and nothing is held.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.core import EngineCore
from engine.plan import Sampled, Work
from engine.streams import Streams
from tests.fake_runner import TILE_BYTES, FakeRunner, alone_with_scores, request
from wire.channel import Buffer
from wire.errors import EngineFailed
from wire.messages import Abort, EngineRequest, PromptLogprobs, StepReport
from wire.settings import EngineSettings

Parts = list[int | tuple[int, int]]

PARTS = st.lists(
    st.one_of(st.integers(1, 6), st.tuples(st.integers(0, 2), st.integers(1, 2))),
    min_size=1,
    max_size=3,
)


class Died(Exception):
    """An engine has computed a deadly token."""


class MortalRunner(FakeRunner):
    """Dies when it draws output ``deadly[name]`` of a request."""

    deadly: dict[str, int]

    def _draw(self, work: Work) -> Sampled:
        row = self.rows[work.id]
        if len(row.tokens) - row.prompt_len == self.deadly.get(work.id):
            raise Died(work.id)
        return super()._draw(work)


class Restarts(RuleBasedStateMachine):
    """Arrivals, departures, and every order of reading, stepping, hearing and dying."""

    @initialize(
        blocks=st.integers(12, 30),
        tokens=st.integers(3, 40),
        seqs=st.integers(1, 5),
        cached=st.booleans(),
        pipelined=st.sampled_from(["on", "off"]),
        tells=st.booleans(),
        draws=st.sampled_from([0, 3]),
    )
    def start(
        self,
        blocks: int,
        tokens: int,
        seqs: int,
        cached: bool,
        pipelined: str,
        tells: bool,
        draws: int,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.settings = EngineSettings(
            block_size=3,
            num_kv_blocks=blocks,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
            max_num_encoder_tiles=2,
            encoder_cache_bytes=2 * TILE_BYTES,
            enable_prefix_caching=cached,
            async_scheduling=pipelined,
        )
        self.capacity = blocks * 3
        self.draws = draws
        self.tells = tells  # who was being computed at a death
        self.streams = Streams(self.send, trial=1)
        self.core: EngineCore | None = None
        self.requests: dict[str, tuple[Parts, dict[str, Any]]] = {}
        self.deadly: dict[str, int] = {}
        self.readers: dict[str, asyncio.Task[None]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.scores: dict[str, list[PromptLogprobs]] = {}
        self.failed: dict[str, EngineFailed] = {}
        self.left: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.undeserved = 0  # deaths that no open request is the cause of
        self.connect()

    def send(self, message: EngineRequest | Abort, buffers: Sequence[Buffer]) -> None:
        self.unread.append((message, buffers))
        if isinstance(message, EngineRequest):
            self.sent.add(message.id)

    @precondition(lambda self: self.core is None)
    @rule()
    def connect(self) -> None:
        self.runner = MortalRunner(self.settings, draws_eos=True, draws=self.draws)
        self.runner.deadly = self.deadly
        self.core = EngineCore(self.settings, self.runner, self.runner.ready())
        self.unread: list[tuple[EngineRequest | Abort, Sequence[Buffer]]] = []
        self.unheard: list[StepReport] = []
        self.sent: set[str] = set()
        self.streams.connect()

    @rule(
        parts=PARTS,
        max_tokens=st.integers(1, 30),
        seed=st.integers(0, 2),
        count=st.integers(1, 3),
        scores=st.sampled_from([-1, 2]),
        deadly=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)),
    )
    def arrive(
        self,
        parts: Parts,
        max_tokens: int,
        seed: int,
        count: int,
        scores: int,
        deadly: int | None,
    ) -> None:
        """Some requests that differ in their seeds; the first may be deadly."""
        if deadly is not None:
            self.deadly[f"r{len(self.requests)}"] = deadly
        for number in range(count):
            name = f"r{len(self.requests)}"
            options = {"seed": seed + number, "prompt_logprobs": scores}
            self.requests[name] = parts, options | {"max_tokens": max_tokens}
            self.readers[name] = self.loop.create_task(self.read(name))
        self.let_readers_run()

    async def read(self, name: str) -> None:
        parts, options = self.requests[name]
        got = self.tokens[name] = []
        ended = False
        try:
            async for output in self.streams.read(*request(name, *parts, **options)):
                assert not ended, "an output after the last one"
                if output.prompt_logprobs is not None:
                    assert not got, "not in the first output"
                    self.scores[name] = output.prompt_logprobs
                got += output.token_ids
                ended = output.finish_reason is not None
            assert ended, "a stream without an end"
        except EngineFailed as error:
            self.failed[name] = error

    def let_readers_run(self) -> None:
        async def turn() -> None:
            for _ in range(3):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    def open(self) -> list[str]:
        return [name for name, reader in self.readers.items() if not reader.done()]

    @precondition(lambda self: self.open())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open()))
        self.left.add(name)
        self.readers[name].cancel()
        self.let_readers_run()

    @precondition(lambda self: self.core is not None and self.unheard_of())
    @rule()
    def leave_before_the_engine_knows(self) -> None:
        for name in self.unheard_of():
            self.left.add(name)
            self.readers[name].cancel()
        self.let_readers_run()

    def unheard_of(self) -> list[str]:
        """Open requests that are on their way to the engine."""
        waiting = [m.id for m, _ in self.unread if isinstance(m, EngineRequest)]
        return [name for name in self.open() if name in waiting]

    @precondition(lambda self: self.core is not None and self.unread)
    @rule(count=st.integers(1, 4))
    def engine_reads(self, count: int) -> None:
        assert self.core is not None
        messages, self.unread = self.unread[:count], self.unread[count:]
        for message, buffers in messages:
            self.core.take(message, buffers)

    @precondition(lambda self: self.core is not None and self.core.has_work)
    @rule(count=st.integers(1, 12))
    def engine_steps(self, count: int) -> None:
        assert self.core is not None
        for _ in range(count):
            try:
                report = self.core.step()
            except Died as death:
                suspects = self.core.suspects if self.tells else []
                self.hear(len(self.unheard))
                self.lose(suspects, str(death))
                return
            self.core._scheduler.check()
            if report is not None:
                self.unheard.append(report)

    @precondition(lambda self: self.core is not None and self.unheard)
    @rule(count=st.integers(1, 12))
    def hear(self, count: int) -> None:
        reports, self.unheard = self.unheard[:count], self.unheard[count:]
        for report in reports:
            self.streams.deal(report)
        self.let_readers_run()

    @precondition(lambda self: self.core is not None)
    @rule(count=st.integers(1, 12), lag=st.integers(0, 3))
    def go_on(self, count: int, lag: int) -> None:
        """As a rule both sides read what there is; the front end some reports later."""
        for _ in range(count):
            if self.core is None:
                return
            self.engine_reads(len(self.unread))
            self.engine_steps(1)
            self.hear(max(0, len(self.unheard) - lag))

    @precondition(lambda self: self.core is not None)
    @rule(heard=st.integers(0, 12), back=st.booleans())
    def kill(self, heard: int, back: bool) -> None:
        self.hear(heard)
        self.lose([], None)
        if back:
            self.connect()

    def lose(self, suspects: list[str], culprit: str | None) -> None:
        """The engine is gone, because of ``culprit`` or for a reason of its own."""
        known, present = set(self.failed), self.sent & set(self.open())
        self.core = None
        self.streams.disconnect(suspects)
        self.let_readers_run()
        convicted = set(self.failed) - known
        assert len(convicted) <= 1
        assert convicted <= present, "who was not there cannot have done it"
        assert all(self.deaths[name] for name in convicted), "one death proves nothing"
        if culprit in present:
            assert convicted <= {culprit}
        else:
            self.undeserved += 1
        self.deaths.update(present)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        turns = 0
        while self.open() or self.core is None or self.core.has_work or self.unread:
            if self.core is None:
                self.connect()
                continue
            self.engine_reads(len(self.unread))
            self.engine_steps(1)
            self.hear(len(self.unheard))
            turns += 1
            assert turns < 5000, "this never ends"
        self.loop.close()
        for name, reader in self.readers.items():
            if name not in self.left:
                reader.result()
        assert not self.streams.at_work
        assert self.core._scheduler.stats.blocks_used == 0
        assert not self.runner.rows
        assert not self.runner.raw
        self.check_tokens()

    def check_tokens(self) -> None:
        innocent = 0
        for name, (parts, options) in self.requests.items():
            length = sum(p if isinstance(p, int) else p[1] * 4 for p in parts)
            if length > self.capacity:
                assert not self.tokens.get(name)
                continue
            longest = min(self.capacity + 1, 256)
            whole, scores = alone_with_scores(
                *parts, **options, draws_eos=True, draws=self.draws, max_model_len=longest
            )
            got = self.tokens.get(name, [])
            assert self.scores.get(name) == (scores if got else None)
            assert got == whole[: len(got)]
            if name in self.left:
                continue
            deadly = self.deadly.get(name, 99)
            assert (got == whole) == (name not in self.failed)
            assert name in self.failed or deadly >= len(whole), "a deadly token was drawn"
            # Where steps are pipelined one more token is drawn before the end is known.
            innocent += name in self.failed and deadly > len(whole)
        event(f"convicted {len(self.failed) > 0}")
        assert innocent <= self.undeserved


Restarts.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestRestarts = Restarts.TestCase
