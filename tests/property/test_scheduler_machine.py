"""Random traffic through a core with tiny budgets.

After every step the scheduler's invariants hold and the runner has found nothing wrong with the
plan; in the end every request has ended exactly once, with the tokens it gets alone, and nothing
is held. The model fails rows whose last token is one of some.
"""

import math
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.cost import CostModel, Load, count_pairs
from engine.plan import StepPlan
from tests.fake_runner import TILE_BYTES, Engine, alone_with_scores
from wire.messages import StepReport

Parts = list[int | tuple[int, int]]

# The same picture seed may come with several tile counts: those are different pictures.
PARTS = st.lists(
    st.one_of(st.integers(1, 6), st.tuples(st.integers(0, 3), st.integers(1, 4))),
    min_size=1,
    max_size=5,
)
PLACES = st.fixed_dictionaries(
    {
        "priority": st.integers(-2, 2),
        "tenant": st.sampled_from([b"", b"a", b"b"]),
        "weight": st.sampled_from([1.0, 3.0]),
    }
)
COSTS = st.builds(
    CostModel,
    steps=st.just(4e-3),
    rows=st.sampled_from([1e-5, 1e-3]),
    reads=st.sampled_from([1e-8, 1e-5]),
    tokens=st.sampled_from([1e-5, 1e-3]),
    pairs=st.sampled_from([1e-8, 1e-5]),
    tiles=st.sampled_from([1e-4, 1e-3, 1e-2]),
)


class Traffic(RuleBasedStateMachine):
    """Arrivals, steps and aborts in any order."""

    @initialize(
        block_size=st.sampled_from([1, 3, 4, 12, 16, 24]),
        blocks=st.integers(8, 40),
        tokens=st.integers(1, 40),
        seqs=st.integers(1, 6),
        tiles=st.integers(1, 6),
        cache_tiles=st.integers(1, 6),
        pipelined=st.sampled_from(["on", "off"]),
        on_trial=st.sampled_from([0, 5, 9]),
        draws=st.sampled_from([0, 3]),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        bad_after=st.sampled_from([frozenset(), frozenset({7, 50, 81})]),
        budget=st.sampled_from([0.0, 0.0, 1.0, 8.0, 30.0]),
        cost=COSTS,
    )
    def start(
        self,
        block_size: int,
        blocks: int,
        tokens: int,
        seqs: int,
        tiles: int,
        cache_tiles: int,
        pipelined: str,
        on_trial: int,
        draws: int,
        policy: str,
        bad_after: frozenset[int],
        budget: float,
        cost: CostModel,
    ) -> None:
        self.capacity = block_size * blocks
        self.engine = Engine(
            block_size=block_size,
            num_kv_blocks=blocks,
            max_num_batched_tokens=tokens,
            max_num_seqs=seqs,
            max_num_encoder_tiles=tiles,
            encoder_cache_bytes=cache_tiles * TILE_BYTES,
            async_scheduling=pipelined,
            speculative_tokens=on_trial,
            draws=draws,
            scheduling_policy=policy,
            step_budget_ms=budget,
            draws_eos=True,
            bad_after=bad_after,
            cost=cost,
        )
        self.budget = budget / 1000 or math.inf
        self.bad_after = bad_after
        self.draws = draws
        self.requests: dict[str, tuple[Parts, dict[str, Any]]] = {}
        self.aborted: set[str] = set()

    @rule(
        parts=PARTS,
        max_tokens=st.integers(1, 25),
        seed=st.integers(0, 3),
        stop=st.sets(st.integers(0, 94), max_size=8),
        salt=st.sampled_from([b"", b"", b"salt"]),
        scores=st.sampled_from([-1, -1, 2]),
        place=PLACES,
    )
    def arrive(
        self,
        parts: Parts,
        max_tokens: int,
        seed: int,
        stop: set[int],
        salt: bytes,
        scores: int,
        place: dict[str, Any],
    ) -> None:
        name = f"r{len(self.requests)}"
        options = {
            "max_tokens": max_tokens,
            "seed": seed,
            "stop": tuple(sorted(stop)),
            "salt": salt,
            "prompt_logprobs": scores,
            **place,
        }
        self.requests[name] = parts, options
        self.engine.add(name, *parts, **options)
        self.engine.scheduler.check()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), max_tokens=st.integers(1, 25), place=PLACES)
    def ask_again(self, data: st.DataObject, max_tokens: int, place: dict[str, Any]) -> None:
        """A prompt that was sent before, so that prefixes are found, whole and in part."""
        parts, options = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        name = f"r{len(self.requests)}"
        self.requests[name] = [*parts, 3], options | {"max_tokens": max_tokens} | place
        self.engine.add(name, *self.requests[name][0], **self.requests[name][1])

    @precondition(lambda self: self.engine.core.has_work)
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            cost, planned = self.engine.core._pace.cost, len(self.engine.runner.plans)
            report = self.engine.core.step()
            if report is not None:
                self.engine.take(report)
            for plan in self.engine.runner.plans[planned:]:
                self.check_time(plan, cost)

    def check_time(self, plan: StepPlan, cost: CostModel | None) -> None:
        """Beside rows that generate, and behind the end of a prompt where nobody does, prompts and
        pictures keep to what is left of the budget, or are a single tile and position."""
        assert cost is not None
        rows = [w for w in plan.work if w.count == 1 + len(w.speculated) and w.sample]
        prompts = [w for w in plan.work if w not in rows]
        started = {new.id for new in plan.new_rows}
        generating = [w.start for w in rows if w.id not in started]
        if plan.preempted:
            return  # what was preempted counted as generating at first
        end = next((i for i, w in enumerate(plan.work, 1) if w.sample), len(plan.work))
        bound = prompts if generating else [w for w in prompts if w in plan.work[end:]]
        if not bound:
            return
        beside = cost.predict(Load(rows=len(generating), reads=sum(generating)))
        left = max(self.budget - beside, beside / 2)
        tokens = sum(w.count for w in prompts)
        pairs = sum(count_pairs(w.start, w.count) for w in prompts)
        tiles = sum(item.tiles for item in plan.encode)
        taken = cost.predict(Load(0, len(prompts), 0, tokens, pairs, tiles))
        assert taken <= left + 1e-9 or (tokens <= 1 and tiles <= 1), (taken, left)
        if self.budget < math.inf:
            event(f"prompts {'beside rows that generate' if generating else 'behind the first'}")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.core.abort([self.pick(data)])
        self.engine.scheduler.check()

    # Where steps are pipelined, every abort comes while one runs.
    @precondition(
        lambda self: (
            self.requests and self.engine.scheduler.has_work and not self.engine.core._pipelined
        )
    )
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data: st.DataObject) -> None:
        scheduler, runner = self.engine.scheduler, self.engine.runner
        plan = scheduler.plan()
        assert plan is not None
        result = runner.execute(plan)
        self.engine.core.abort([self.pick(data)])
        self.engine.take(StepReport(scheduler.commit(result), scheduler.stats))

    @rule()
    def flush(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.flush()
        scheduler.check()
        assert not scheduler._pool._found
        assert not scheduler._pool._parts.blocks
        assert len(scheduler._vision._entries) == scheduler._vision.num_referenced

    def pick(self, data: st.DataObject) -> str:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if name not in self.engine.ends:
            self.aborted.add(name)
        return name

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.finish()
        event(f"preempted {self.engine.scheduler.stats.preemptions > 0}")
        event(f"found {self.engine.scheduler.stats.cached_tokens > 0}")
        event(f"speculated {self.engine.scheduler.stats.speculated_tokens > 0}")
        event(f"accepted {self.engine.scheduler.stats.accepted_tokens > 0}")
        event(f"copied {any(plan.copies for plan in self.engine.runner.plans)}")
        assert set(self.engine.ends) == set(self.requests) - self.aborted
        for name, (parts, options) in self.requests.items():
            length = sum(p if isinstance(p, int) else p[1] * 4 for p in parts)
            if length > self.capacity:
                if name in self.engine.ends:
                    assert self.engine.ends[name].finish_reason == "error"
                continue
            whole, scores = alone_with_scores(
                *parts,
                **options,
                draws_eos=True,
                draws=self.draws,
                bad_after=self.bad_after,
                max_model_len=min(self.capacity + 1, 256),
            )
            got = self.engine.tokens.get(name, [])
            assert self.engine.scores.get(name) == (scores if got else None)
            assert got == whole[: len(got)]
            assert name in self.aborted or got == whole


Traffic.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestTraffic = Traffic.TestCase
