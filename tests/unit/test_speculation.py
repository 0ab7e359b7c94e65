"""Which tokens are computed on trial, and for whom."""

import itertools
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.cost import CostModel, Load
from engine.memory import largest_step
from engine.plan import Sampled, StepPlan, Work
from engine.speculation import PromptLookup, behind
from tests.fake_runner import EOS, GEOMETRY, Engine, FakeRunner, alone, request
from wire.loading import load
from wire.messages import EngineOutput, EngineRequest, TokenLogprobs, pack
from wire.sampling import Grammar, SamplingParams
from wire.settings import EngineSettings, SettingError


def find(tokens: list[int], most: int = 9, prediction: list[int] | None = None) -> list[int]:
    return PromptLookup(pack(prediction or [])).find(tokens, most)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 1], [2, 3]),  # one is alike, so two are trusted
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 5, 9, 1, 6, 8, 1], [6, 8]),  # the last of two that are as long alike
        ([2, 1, 5, 9, 3, 1, 6, 9, 2, 1], [5, 9, 3]),  # the longer one, though it is further back
        ([4, 4, 4], [4, 4, 4]),  # where it goes in circles more is tried than is there
        ([7, 8, 7, 8, 7, 8], [7, 8, 7, 8, 7]),
    ],
)
def test_what_came_next_before_is_found(tokens: list[int], found: list[int]) -> None:
    assert find(tokens) == found
    assert find(tokens, 1) == found[:1]


def slowly(tokens: list[int], most: int) -> list[int]:
    """The same by its definition."""
    best, place = 0, 0
    for end in range(1, len(tokens)):
        pairs = zip(reversed(tokens[:end]), reversed(tokens), strict=False)
        alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if min(alike, 8) >= max(best, 1):
            best, place = min(alike, 8), end
    circle = itertools.cycle(tokens[place:])
    return list(itertools.islice(circle, min(best + 1, most))) if best else []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12), st.data())
def test_the_longest_match_is_found_however_the_tokens_came(
    tokens: list[int], most: int, data: st.DataObject
) -> None:
    lookup = PromptLookup(b"")
    for end in sorted(data.draw(st.sets(st.integers(1, max(len(tokens), 1)), max_size=5))):
        assert lookup.find(tokens[:end], most) == slowly(tokens[:end], most)


def test_a_prediction_is_looked_up_too_and_ends_where_it_ends() -> None:
    assert find([9, 1, 2], 9, [7, 1, 2, 3, 4]) == [3, 4]
    assert find([9, 4], 9, [7, 1, 2, 3, 4]) == []
    assert find([8, 2, 5, 1, 2], 9, [7, 1, 2, 3, 4]) == [3, 4]  # longer alike than what came
    assert find([1, 2, 5, 1, 2], 9, [7, 1, 2, 3, 4]) == [5, 1, 2]


def plans(engine: Engine) -> list[StepPlan]:
    engine.finish()
    return engine.runner.plans


def most_together(plan: StepPlan) -> list[int]:
    return [len(work.speculated) for work in plan.work]


@pytest.mark.parametrize(("seqs", "each"), [(1, 5), (2, 2), (3, 1), (4, 0), (6, 0)])
def test_few_sequences_share_what_a_step_has_for_it(seqs: int, each: int) -> None:
    """Six tokens at most, those that are known among them."""
    engine = Engine(speculative_tokens=5, draws=1, block_size=64, max_num_seqs=seqs)
    for number in range(seqs):
        engine.add(f"r{number}", 3, seed=number, max_tokens=40)
    tried = [most_together(plan) for plan in plans(engine)]
    assert max(count for counts in tried[: 40 // 6] for count in counts) == each
    assert all(len(counts) + sum(counts) <= max(6, seqs) for counts in tried)


def test_who_comes_in_beside_them_is_not_kept_out() -> None:
    """The runner is told of no more rows than it may draw for: it checks."""
    engine = Engine(speculative_tokens=5, draws=1, block_size=64, max_num_seqs=4)
    engine.add("r", 3, seed=9, max_tokens=40)
    while not engine.step().work[0].speculated:
        pass
    for number in range(3):
        engine.add(f"r{number}", 1, seed=number, max_tokens=40)
    plan = engine.step()
    assert [work.sample + len(work.speculated) for work in plan.work] == [6, 1, 1, 1]
    engine.finish()


def test_right_ones_save_steps_and_are_counted() -> None:
    engine = Engine(speculative_tokens=5, draws=1, block_size=64)
    engine.add("r", 3, max_tokens=40)
    engine.finish()
    stats = engine.scheduler.stats
    assert engine.tokens["r"] == [0] * 40
    assert stats.steps <= 40 / 4
    assert stats.generated_tokens == 40
    assert stats.accepted_tokens == 40 - sum(len(plan.work) for plan in engine.runner.plans)
    assert 0 < stats.accepted_tokens <= stats.speculated_tokens


def test_wrong_ones_cost_no_step_and_are_counted() -> None:
    engine = Engine(speculative_tokens=5, num_kv_blocks=512)
    engine.add("r", 90, max_tokens=30)
    engine.finish()
    assert engine.tokens["r"] == alone(90, max_tokens=30)
    stats = engine.scheduler.stats
    assert stats.accepted_tokens < stats.speculated_tokens
    assert stats.steps == 2 + 30 - stats.accepted_tokens  # two for the prompt


def test_a_prediction_is_followed_and_may_be_wrong_anywhere() -> None:
    expected = alone(5, max_tokens=40)
    steps = {}
    for wrong in (None, 0, 1, 20, 39):
        prediction = list(expected)
        if wrong is not None:
            prediction[wrong] = (prediction[wrong] + 1) % EOS
        engine = Engine(speculative_tokens=5, num_kv_blocks=512)
        made, _ = request("r", 5, max_tokens=40)
        engine.core.add(msgspec.structs.replace(made, prediction=pack(prediction)))
        engine.finish()
        assert engine.tokens["r"] == expected
        steps[wrong] = engine.scheduler.stats.steps
    assert steps[None] < 15
    assert max(steps.values()) < 20


@pytest.mark.parametrize("stuck", [True, False])
def test_what_was_right_is_told_before_an_error(stuck: bool) -> None:
    right = [Sampled("r", 5, logprobs=TokenLogprobs(-1.0, [])), Sampled("r", 6)]
    error = EngineOutput("r", [], "stuck" if stuck else "error", error=None if stuck else "bad")
    assert behind(right, error) == [
        EngineOutput("r", [5, 6], logprobs=[TokenLogprobs(-1.0, [])]),
        error,
    ]


def test_nothing_is_right_behind_a_token_that_fails() -> None:
    expected = alone(5, max_tokens=40)
    place = next(i for i in range(15, 40) if expected[i] not in expected[:i])
    bad = frozenset({expected[place]})
    engine = Engine(speculative_tokens=9, block_size=64, bad_after=bad)
    made, _ = request("r", 5, max_tokens=40)
    engine.core.add(msgspec.structs.replace(made, prediction=pack(expected)))
    engine.finish()
    assert engine.tokens["r"] == expected[: place + 1]
    assert engine.ends["r"].finish_reason == "error"
    assert engine.scheduler.stats.accepted_tokens > 10


@pytest.mark.parametrize("prediction", [pack([1, 97]), pack([1, -1]), pack([1, 2])[:-1]])
def test_a_prediction_that_the_model_cannot_have_made_is_refused(prediction: bytes) -> None:
    engine = Engine()
    made, _ = request("r", 5)
    engine.core.add(msgspec.structs.replace(made, prediction=prediction))
    engine.finish()
    assert engine.ends["r"].finish_reason == "error"


@pytest.mark.parametrize("token", [0xFEFF, 0xD800, 0xDFFF, 0xFFFE, 0x10FFFE])
def test_any_token_can_be_looked_up(token: int) -> None:
    """Whatever its number means as a character."""
    assert find([7, 5], prediction=[token, 5, token]) == [token]
    assert find([token, 5, token]) == [5, token]


def test_the_first_token_comes_alone() -> None:
    """Even where a step of its own is left for the last token of the prompt."""
    engine = Engine(speculative_tokens=5, draws=1, block_size=64, max_num_batched_tokens=8)
    made, _ = request("r", 9, max_tokens=9)
    engine.core.add(msgspec.structs.replace(made, prediction=pack([*made.prompt, 0, 0, 0, 0])))
    first, second, third, *_ = plans(engine)
    assert [plan.work[0].count for plan in (first, second)] == [8, 1]
    assert third.work[0].speculated == (0, 0, 0)  # the rest of the prediction


def test_no_block_is_taken_and_no_budget_broken_for_them() -> None:
    engine = Engine(
        speculative_tokens=9, draws=1, block_size=4, num_kv_blocks=11, max_num_batched_tokens=4
    )
    engine.add("a", 3, max_tokens=20)
    engine.add("b", 2, max_tokens=20, seed=1)
    engine.finish()  # the runner checks both
    assert engine.scheduler.stats.accepted_tokens > 0
    assert engine.scheduler.stats.preemptions == 0
    assert engine.tokens == {"a": [0] * 20, "b": [0] * 20}


def test_who_waits_comes_in_though_they_could_take_all_tokens_of_a_step() -> None:
    engine = Engine(speculative_tokens=9, draws=1, block_size=64, max_num_batched_tokens=8)
    engine.add("a", 3, max_tokens=50)
    for _ in range(5):
        plan = engine.step()
    assert len(plan.work[0].speculated) > 5
    engine.add("b", 3, max_tokens=1, seed=1)
    assert [work.id for work in engine.step().work] == ["a", "b"]


def test_a_tenant_is_charged_for_those_that_were_right() -> None:
    """All but the last token of an answer are computed, be they the last to come or not."""
    charged = []
    for on_trial in (0, 5):
        engine = Engine(
            speculative_tokens=on_trial, block_size=64, scheduling_policy="fair", max_num_seqs=1
        )
        made, _ = request("r", 4, max_tokens=7, tenant=b"t")
        engine.core.add(msgspec.structs.replace(made, prediction=pack(alone(4, max_tokens=7))))
        engine.finish()
        assert (engine.scheduler.stats.accepted_tokens > 0) == (on_trial > 0)
        charged.append(engine.scheduler._waiting._counters)
    assert charged == [{b"t": 10.0}] * 2


@pytest.mark.parametrize(("seqs", "tokens", "rows"), [(1, 64, 6), (9, 64, 14), (1, 4, 4)])
def test_the_largest_step_draws_behind_them_too(seqs: int, tokens: int, rows: int) -> None:
    settings = EngineSettings(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    *_, plan = largest_step(settings, GEOMETRY, 64, 97, torch.device("cpu"))
    assert sum(work.sample for work in plan.work) == rows


def test_in_time_they_are_rows_not_a_prompt() -> None:
    work = Work("a", 10, 4, [], True, speculated=(1, 2, 3))
    plan = StepPlan(
        0, [], [work, Work("b", 7, 1, [], True), Work("c", 0, 3, [], False)], [], [], []
    )
    reads = 11 + 12 + 13 + 14 + 8
    assert Load.of(plan) == Load(rows=1 + 3 + 1 + 1, reads=reads, tokens=3, pairs=1 + 2 + 3)


def test_a_prompt_beside_them_gets_no_less_done() -> None:
    cost = CostModel(steps=4e-3, rows=1e-4, reads=1e-9, tokens=1e-3, pairs=1e-9, tiles=1e-2)
    chunks = []
    for on_trial in (0, 5):
        engine = Engine(
            speculative_tokens=on_trial, draws=1, block_size=64, step_budget_ms=20, cost=cost
        )
        engine.add("a", 3, max_tokens=40)
        for _ in range(5):
            engine.step()
        engine.add("b", 60, max_tokens=1, seed=1)
        plan = engine.step()
        assert any(work.speculated for work in plan.work) == (on_trial > 0)
        chunks.append(next(work.count for work in plan.work if work.id == "b"))
    assert chunks[0] == chunks[1] < 60


def test_nothing_is_tried_that_would_end_the_sequence() -> None:
    engine = Engine(speculative_tokens=5, draws=1, num_kv_blocks=512)
    engine.add("r", 3, max_tokens=9, stop=(0,))
    engine.finish()
    assert engine.tokens["r"] == [0]
    assert engine.scheduler.stats.speculated_tokens == 0


def test_nor_under_a_grammar() -> None:
    engine = Engine(speculative_tokens=5, draws=1, num_kv_blocks=512)
    engine.runner._ready = msgspec.structs.replace(engine.runner.ready(), grammars=True)
    engine.core = EngineCore(engine.settings, engine.runner, engine.runner.ready())
    engine.scheduler = engine.core._scheduler
    sampling = SamplingParams(max_tokens=9, grammar=Grammar("regex", "a*"), stop_token_ids=(EOS,))
    engine.core.add(EngineRequest("r", [1, 2], sampling))
    engine.finish()
    assert engine.tokens["r"] == [0] * 9
    assert engine.scheduler.stats.speculated_tokens == 0


@pytest.mark.parametrize(
    ("device", "settings", "tried", "pipelined"),
    [
        ("cpu", {}, True, False),
        ("cpu", {"speculative_tokens": 0}, False, False),
        ("cpu", {"async_scheduling": "on"}, False, True),
        ("cuda:0", {}, False, True),
        ("cuda:0", {"async_scheduling": "off"}, False, False),
        ("cuda:0", {"speculative_tokens": 4}, True, False),
    ],
)
def test_steps_ahead_or_tokens_on_trial(
    device: str, settings: dict[str, Any], tried: bool, pipelined: bool
) -> None:
    """Who plans a step before the one before has drawn does not know behind what to look."""
    options = EngineSettings(block_size=4, num_kv_blocks=64, **settings)
    runner = FakeRunner(options, draws=1)
    ready = msgspec.structs.replace(runner.ready(), device=device)
    core = EngineCore(options, runner, ready)
    core.add(*request("r", 3, max_tokens=30))
    flying = set()
    while core.step() is not None:
        flying.add(core._flying is not None)
    assert (core._scheduler.stats.speculated_tokens > 0) == tried
    assert (True in flying) == pipelined


def test_both_at_once_cannot_be_asked_for() -> None:
    both = {"async_scheduling": "on", "speculative_tokens": "3"}
    with pytest.raises(SettingError, match="speculative_tokens"):
        load(both, {})
    assert load(both | {"speculative_tokens": "0"}, {}).engine.speculative_tokens == 0
