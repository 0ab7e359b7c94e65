"""What the scheduler plans under a step budget, with a runner whose steps take what the cost model
says: streams go on while prompts and pictures arrive, and these get on."""

import itertools

import msgspec
import pytest

from engine.cost import CostModel, Load
from engine.plan import StepPlan
from tests.fake_runner import TILE_BYTES, Engine, alone

COST = CostModel(steps=0.01, rows=1e-3, reads=1e-6, tokens=1e-3, pairs=1e-6, tiles=0.02)


def engine(budget: float, cost: CostModel = COST, **settings: object) -> Engine:
    """``budget`` in milliseconds."""
    return Engine(cost=cost, step_budget_ms=budget, **settings)


def generating(streams: Engine, count: int = 2) -> Engine:
    for number in range(count):
        streams.add(f"stream{number}", 2, max_tokens=100, seed=number)
    while len(streams.tokens) < count:
        streams.step()
    return streams


def seconds(plan: StepPlan) -> float:
    return COST.predict(Load.of(plan))


def tiles(plan: StepPlan) -> int:
    return sum(item.tiles for item in plan.encode)


def until_first_token(streams: Engine, name: str) -> list[StepPlan]:
    plans = []
    while name not in streams.tokens:
        plans.append(streams.step())
    return plans


def test_a_long_prompt_is_cut_to_what_the_budget_leaves_while_others_generate() -> None:
    streams = generating(engine(30))
    streams.add("long", 60, max_tokens=2)
    plans = until_first_token(streams, "long")
    assert len(plans) > 3
    for plan in plans:
        assert {"stream0", "stream1"} <= {work.id for work in plan.work}
        assert seconds(plan) <= 0.03
    assert all(seconds(plan) > 0.028 for plan in plans[:-1])
    streams.finish()
    assert streams.tokens["long"] == alone(60, max_tokens=2)


def test_nothing_is_cut_while_nobody_generates_or_without_a_budget() -> None:
    for streams in (engine(30), generating(engine(0)), generating(Engine(step_budget_ms=30))):
        streams.add("long", 12, (1, 4), 12, max_tokens=2)
        assert len(until_first_token(streams, "long")) == 1


def test_of_prompts_that_come_together_the_first_waits_for_no_other() -> None:
    streams = engine(30)
    for seed, name in enumerate("abc", 9):
        streams.add(name, 3, (seed, 4), 3, max_tokens=4, seed=seed)
    plan = streams.step()
    assert [(work.id, work.sample) for work in plan.work] == [("a", True)]
    until_first_token(streams, "b")
    assert "c" not in streams.tokens
    streams.finish()
    for seed, name in enumerate("abc", 9):
        assert streams.tokens[name] == alone(3, (seed, 4), 3, max_tokens=4, seed=seed)


@pytest.mark.parametrize("length", [1, 17])
def test_who_has_one_token_left_of_a_prompt_waits_for_no_other(length: int) -> None:
    streams = engine(30)
    streams.add("before", length, max_tokens=2)
    streams.finish()
    streams.add("again", length, max_tokens=4)
    streams.add("long", 60, max_tokens=2, seed=9)
    plan = streams.step()
    first, second = plan.work
    assert (first.id, first.count, first.sample) == ("again", 1, True)
    assert second.count > 10
    assert seconds(plan) <= 0.03 + COST.rows  # the first one's, which is not counted
    streams.finish()


def test_nor_for_the_one_position_of_another_that_a_step_has_room_for() -> None:
    streams = engine(5, max_num_batched_tokens=5, max_num_encoder_tiles=1)
    streams.add("first", (1, 2), max_tokens=2)
    streams.add("other", 5, max_tokens=2, seed=1)
    assert [(work.id, work.count) for work in streams.step().work] == [("first", 4), ("other", 1)]
    assert [(work.id, work.count) for work in streams.step().work] == [("first", 4)]
    streams.finish()


def test_prompts_that_fit_the_budget_together_end_in_one_step() -> None:
    streams = engine(60)
    for seed, name in enumerate("abc", 9):
        streams.add(name, 12, max_tokens=4, seed=seed)
    assert [work.id for work in streams.step().work if work.sample] == ["a", "b", "c"]
    streams.finish()


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_stream_begins_beside_a_better_prompt_while_its_picture_is_computed(mode: str) -> None:
    policy = {"scheduling_policy": "priority", "max_num_encoder_tiles": 1}
    streams = engine(60, async_scheduling=mode, **policy)
    streams.add("stream", (1, 2), max_tokens=9, priority=1)
    streams.step()
    streams.add("better", 150, max_tokens=2)
    streams.finish()
    plans = [{work.id: work for work in plan.work} for plan in streams.runner.plans]
    drawing = [i for i, plan in enumerate(plans) if "stream" in plan and plan["stream"].sample]
    assert any("better" in plans[i] for i in drawing[1:])
    assert drawing == list(range(drawing[0], drawing[0] + 9))


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_picture_beside_streams_is_encoded_over_several_steps(mode: str) -> None:
    streams = generating(engine(60, async_scheduling=mode))
    streams.add("picture", 3, (1, 9), 3, max_tokens=2)
    plans = until_first_token(streams, "picture")
    assert sum(tiles(plan) for plan in plans) == 9
    assert max(tiles(plan) for plan in plans) == 2
    assert all(seconds(plan) <= 0.06 for plan in plans)
    streams.finish()
    assert streams.tokens["picture"] == alone(3, (1, 9), 3, max_tokens=2)


def test_a_tile_over_the_budget_goes_alone_with_the_first_position_that_shows_it() -> None:
    streams = generating(engine(20))
    streams.add("picture", (1, 3), max_tokens=2)
    plan = streams.step()
    assert (tiles(plan), {work.id: work.count for work in plan.work}["picture"]) == (1, 1)
    plans = [plan, *until_first_token(streams, "picture")]
    assert sum(tiles(plan) for plan in plans) == 3
    assert max(seconds(plan) for plan in plans) < 0.02 + COST.tiles
    streams.finish()
    assert streams.tokens["picture"] == alone((1, 3), max_tokens=2)


def test_beside_rows_that_take_the_whole_budget_prompts_still_get_a_share() -> None:
    streams = generating(engine(1, num_kv_blocks=512), 30)
    streams.add("long", 50, max_tokens=2)
    plans = until_first_token(streams, "long")
    assert 2 < len(plans) < 6
    for plan in plans:
        rows = COST.predict(Load(rows=30, reads=sum(w.start for w in plan.work if w.count == 1)))
        assert seconds(plan) <= 1.5 * rows + 0.001
    streams.finish()


def test_who_came_first_gets_the_time_and_the_next_what_is_left() -> None:
    streams = generating(engine(40))
    for seed, name in enumerate("abc", 9):
        streams.add(name, 18, max_tokens=2, seed=seed)
    plans = until_first_token(streams, "c")
    counts = [
        {work.id: work.count for work in plan.work if work.id in "abc" and work.count > 1}
        for plan in plans
    ]
    assert counts[0].keys() == {"a", "b"}
    assert counts[0]["a"] == 18
    assert 0 < counts[0]["b"] < 18
    assert list(itertools.chain(*counts)).index("c") > 1
    streams.finish()


def test_a_picture_begun_goes_on_beside_an_earlier_one_that_waits_for_its_room() -> None:
    """Each tile is over the budget; the one that waits must not use up the tile that a step may
    have in any case."""
    streams = generating(
        engine(20, scheduling_policy="priority", encoder_cache_bytes=4 * TILE_BYTES)
    )
    streams.add("begun", (1, 3), max_tokens=2)
    streams.step()
    streams.add("better", (2, 3), max_tokens=2, priority=-1)
    plans = until_first_token(streams, "begun")
    assert sum(tiles(plan) for plan in plans) == 2
    streams.finish()
    assert streams.tokens["better"] == alone((2, 3), max_tokens=2)


def test_a_machine_slower_than_it_seemed_gets_shorter_chunks() -> None:
    streams = generating(engine(30))
    streams.runner.start_cost = CostModel(*(4 * each for each in COST))  # since the start
    streams.add("long", 60, max_tokens=2)
    counts = [
        {work.id: work.count for work in plan.work}["long"]
        for plan in until_first_token(streams, "long")
    ]
    assert counts[0] > 2 * counts[-2]
    assert streams.core._stats().step_seconds > streams.core._stats().predicted_seconds > 0
    streams.finish()


def test_the_same_calls_and_costs_give_the_same_plans_byte_for_byte() -> None:
    def run(cost: CostModel) -> list[bytes]:
        streams = generating(engine(30, cost))
        for number in range(6):
            streams.add(f"r{number}", 2, (number % 3, 1 + number % 4), 20, max_tokens=6)
        streams.finish()
        return [msgspec.msgpack.encode(plan) for plan in streams.runner.plans]

    assert run(COST) == run(COST)
    assert run(COST) != run(COST._replace(tokens=2e-3))
