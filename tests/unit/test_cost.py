"""The cost model: what it predicts, how it is fitted and corrected, and what a budget leaves."""

import math
import random
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from engine.cost import Allowance, CostModel, Load, Pace, count_pairs, step_budget
from engine.plan import EncodeItem, StepPlan, StepResult, Work
from engine.trial import Trial
from tests.fake_runner import FakeRunner
from wire.channel import Buffer
from wire.messages import EngineRequest, Ready
from wire.settings import EngineSettings

COST = CostModel(steps=0.08, rows=2e-3, reads=2e-6, tokens=6e-4, pairs=3e-7, tiles=0.7)


def plan(*work: tuple[int, int], tiles: int = 0) -> StepPlan:
    rows = [Work(f"{i}", start, count, [], True) for i, (start, count) in enumerate(work)]
    return StepPlan(0, [], rows, [EncodeItem(b"x", "0", 0, tiles)] if tiles else [], [], [])


def result(step: StepPlan, truth: CostModel, factor: float = 1.0) -> StepResult:
    encoding = [item.tiles * truth.tiles * factor for item in step.encode]
    return StepResult(0, [], [], encoding, truth.predict(Load.of(step)) * factor)


def test_the_load_of_a_step_is_counted_position_by_position() -> None:
    step = plan((9, 1), (0, 4), (6, 3), tiles=5)
    pairs = sum(at + 1 for start, count in ((0, 4), (6, 3)) for at in range(start, start + count))
    assert Load.of(step) == Load(steps=1, rows=3, reads=10, tokens=7, pairs=pairs, tiles=5)
    assert Load.of(StepPlan(0, [], [], [], [], ["gone"])) == Load()


class Device:
    """A runner whose steps take exactly what a cost model says."""

    def __init__(self, truth: CostModel, ready: Ready) -> None:
        self.truth = truth
        self._ready = ready
        self.rows: set[str] = set()
        self.tiles: set[str] = set()
        self.largest = 0
        self.steps = 0

    def ready(self) -> Ready:
        return self._ready

    def cost(self) -> CostModel | None:
        return None

    def prepare(self, request: EngineRequest) -> Future[object] | None:
        return None

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        self.tiles.add(request.id)

    def begin(self, step: StepPlan) -> None:
        self.plan = step
        self.rows -= set(step.removed)
        self.tiles -= set(step.removed)
        new = {row.id for row in step.new_rows}
        assert not new & self.rows
        self.rows |= new
        assert {work.id for work in step.work} <= self.rows
        assert {item.request_id for item in step.encode} <= self.tiles
        capacity = self._ready.blocks_total * self._ready.block_size
        for row, work in zip(step.new_rows, step.work, strict=True):
            blocks = row.blocks + work.new_blocks
            assert set(blocks) <= set(range(self._ready.blocks_total))
            assert work.start + work.count == len(row.token_ids)
            assert len(row.token_ids) <= min(capacity, len(blocks) * self._ready.block_size)
            assert len(row.token_ids) <= self._ready.max_model_len

    def sample(self) -> None:
        self.steps += 1

    def finish(self) -> StepResult:
        return result(self.plan, self.truth)


def device(truth: CostModel = COST, **values: int) -> tuple[Device, EngineSettings]:
    settings = EngineSettings(**{"num_kv_blocks": 400, "max_model_len": 4096} | values)  # type: ignore[arg-type]
    return Device(truth, FakeRunner(settings).ready()), settings


def test_the_trial_finds_what_steps_cost() -> None:
    runner, settings = device()
    found = Trial(runner, settings).fit()
    assert tuple(found) == pytest.approx(tuple(COST), rel=0.05)
    assert not runner.rows
    assert not runner.tiles
    assert runner.steps < 30


@pytest.mark.parametrize(
    "values",
    [
        {"num_kv_blocks": 1, "block_size": 1, "max_model_len": 1},
        {"num_kv_blocks": 3, "block_size": 2},
        {"max_num_batched_tokens": 1},
        {"max_num_seqs": 1},
        {"max_model_len": 100},
    ],
)
def test_the_trial_keeps_within_small_settings(values: dict[str, int]) -> None:
    runner, settings = device(**values)
    assert all(0 < seconds < math.inf for seconds in Trial(runner, settings).fit())


def test_what_noise_has_swallowed_is_not_taken_for_nothing() -> None:
    runner, settings = device(COST._replace(rows=0.0, reads=0.0, pairs=0.0))
    assert min(Trial(runner, settings).fit()) > 0


def steps(seed: int, count: int) -> list[StepPlan]:
    """Rows that generate, chunks of prompts, and tiles, in any mixture."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        work = [(source.randrange(2000), 1) for _ in range(source.randrange(20))]
        work += [(source.randrange(2000), source.randrange(2, 300))] * source.randrange(3)
        made.append(plan(*work, tiles=source.randrange(3)))
    return made


def test_the_model_follows_a_machine_that_turns_out_to_be_another() -> None:
    pace = Pace(COST)
    truth = CostModel(*(seconds * 3**sign for seconds, sign in zip(COST, (1, -1) * 3, strict=True)))
    for step in steps(1, 3000):
        pace.learn(step, result(step, truth))
    assert pace.cost is not None
    for step in steps(2, 50):
        assert pace.cost.predict(Load.of(step)) == pytest.approx(truth.predict(Load.of(step)), 0.05)


def test_one_step_that_was_held_up_changes_little_and_is_soon_forgotten() -> None:
    pace, step = Pace(COST), plan((100, 1))
    normal = COST.predict(Load.of(step))
    pace.learn(step, result(step, COST, factor=1000))
    assert pace.cost is not None
    assert pace.cost.predict(Load.of(step)) < 1.2 * normal
    for _ in range(20):
        pace.learn(step, result(step, COST))
    assert pace.cost.predict(Load.of(step)) == pytest.approx(normal, 0.01)


def test_what_a_step_does_not_have_is_not_learnt_from_it() -> None:
    pace = Pace(COST)
    for _ in range(100):
        pace.learn(plan((100, 1)), result(plan((100, 1)), COST, factor=2))
    assert pace.cost is not None
    assert pace.cost[3:] == COST[3:]
    assert pace.cost.steps > COST.steps


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_no_measurement_leads_the_model_out_of_all_proportion(factor: float) -> None:
    pace = Pace(COST)
    for step in steps(3, 500):
        pace.learn(step, result(step, COST, factor))
    assert pace.cost is not None
    for seconds, first in zip(pace.cost, COST, strict=True):
        assert 1 / 17 < seconds / first < 17


def test_predictions_are_summed_as_they_were_before_the_step() -> None:
    pace, step = Pace(COST), plan((100, 1))
    pace.learn(step, result(step, COST, factor=2))
    normal = COST.predict(Load.of(step))
    assert (pace.predicted, pace.taken) == (pytest.approx(normal), pytest.approx(2 * normal))
    pace.learn(step, StepResult(0, []))  # nobody has measured it
    before = pace.cost
    pace.learn(StepPlan(0, [], [], [], [], ["gone"]), StepResult(0, [], seconds=1e-9))
    assert pace.cost == before
    assert pace.predicted == pytest.approx(normal)
    blind = Pace(None)
    blind.learn(step, result(step, COST))
    assert (blind.cost, blind.predicted, blind.taken) == (None, 0, pytest.approx(normal))


# What a budget leaves


def test_without_rows_that_generate_there_is_any_time() -> None:
    for allowance in (Allowance(), Allowance.beside(COST, 0.2, [])):
        for _ in range(5):
            assert allowance.fit(0, 100_000) == 100_000
            allowance.take(0, 100_000)
            assert allowance.fits_tile(5, 100)
            allowance.take_tile()


def test_behind_the_end_of_a_prompt_there_is_what_the_budget_leaves() -> None:
    count = Allowance(COST, 0.25 - COST.steps).fit(0, 10_000)
    for before, left in ((count - 100, True), (count, False), (100_000, False)):
        allowance = Allowance.beside(COST, 0.25, [])
        allowance.take(0, before)
        allowance.end_prompt()
        assert (allowance.fit(0, 100_000) > 0) is left
        assert allowance.fits_tile(0, 0) is False
    endless = Allowance()
    endless.end_prompt()
    assert endless.fit(0, 100_000) == 100_000


@pytest.mark.parametrize("seed", range(20))
def test_a_chunk_is_the_longest_that_keeps_to_the_budget(seed: int) -> None:
    source = random.Random(seed)
    contexts = [source.randrange(3000) for _ in range(1 + source.randrange(9))]
    rows = [(context, 1) for context in contexts]
    start = source.randrange(3000)
    count = Allowance.beside(COST, 0.25, contexts).fit(start, 10_000)

    def predicted(length: int) -> float:
        return COST.predict(Load.of(plan(*rows, (start, length))))

    assert predicted(count) <= 0.25 + 1e-4 < predicted(count + 2)


def test_prompts_get_a_share_beside_any_number_of_rows() -> None:
    contexts = [1000] * 500
    alone = COST.predict(Load(rows=500, reads=500_000))
    count = Allowance.beside(COST, 0.2, contexts).fit(0, 10_000)
    taken = COST.rows + COST.tokens * count + COST.pairs * count_pairs(0, count)
    assert taken == pytest.approx(alone / 2, rel=0.01)


def test_the_first_to_ask_gets_one_position_and_one_tile_whatever_they_take() -> None:
    slow = COST._replace(tokens=10.0, tiles=100.0)
    allowance = Allowance.beside(slow, 0.2, [5])
    assert allowance.fit(0, 50) == 1
    assert not allowance.fits_tile(0, before=1)
    assert allowance.fits_tile(0, before=0)
    allowance.take_tile()
    assert not allowance.fits_tile(0, before=0)
    assert allowance.fit(0, 50) == 1
    allowance.take(0, 1)
    assert allowance.fit(0, 50) == 0


def test_the_budget_is_the_devices_unless_it_is_said() -> None:
    assert step_budget(EngineSettings(), "cpu") == 0.2
    assert step_budget(EngineSettings(), "cuda:0") == 0.05
    assert step_budget(EngineSettings(step_budget_ms=70), "cpu") == 0.07
    assert step_budget(EngineSettings(step_budget_ms=0), "cuda:0") == math.inf
