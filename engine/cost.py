"""What a step costs in time, and what the budget leaves for prompts and pictures.

A linear model predicts the seconds of a step from what is in it. Its coefficients are fitted when
the engine starts (engine.trial) and corrected by what real steps take. The Scheduler is handed the
model for each plan and asks it how far prompts may go; it reads no clock.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from engine.plan import StepPlan, StepResult
from wire.settings import EngineSettings

# Milliseconds, where the settings leave it to the device. A stream on the CPU keeps the pace at
# which people read.
_BUDGET = {"cpu": 200.0, "cuda": 50.0}
# Prompts get at least so much of what the rows that generate take, however long that is.
_LEAST_SHARE = 0.5
# How much of an error is corrected by one step, and how much of the prediction may count as error:
# a step that something held up says little about the next one.
_RATE = 0.25
_LARGEST_ERROR = 0.5
# How far coefficients may go from where they started, as a factor.
_RANGE = 16.0


class Load(NamedTuple):
    """What is in a step. Each field has a coefficient of its name in CostModel."""

    steps: int = 1
    rows: int = 0  # sequences that compute something, and tokens on trial
    reads: int = 0  # positions that rows which compute one position, and such tokens, attend to
    tokens: int = 0  # positions of rows that compute several
    pairs: int = 0  # of such a position with one that it attends to
    tiles: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> "Load":
        """What a plan has in it."""
        rows = reads = tokens = pairs = 0
        for work in plan.work:
            rows += 1 + len(work.speculated)
            attended = count_pairs(work.start, work.count)
            if work.count == 1 + len(work.speculated):
                reads += attended
            else:
                tokens += work.count
                pairs += attended
        tiles = sum(item.tiles for item in plan.encode)
        return cls(1, rows, reads, tokens, pairs, tiles)


def count_pairs(start: int, count: int) -> int:
    """Positions that ``count`` positions from ``start`` on attend to, causally."""
    return count * start + count * (count + 1) // 2


class CostModel(NamedTuple):
    """Seconds for one of each field of Load; all above 0."""

    steps: float
    rows: float
    reads: float
    tokens: float
    pairs: float
    tiles: float

    def parts(self, load: Load) -> list[float]:
        """What each field of a load is predicted to take."""
        return [
            self.steps * load.steps,
            self.rows * load.rows,
            self.reads * load.reads,
            self.tokens * load.tokens,
            self.pairs * load.pairs,
            self.tiles * load.tiles,
        ]

    def predict(self, load: Load) -> float:
        """Seconds of a step with this load."""
        return sum(self.parts(load))


class Pace:
    """The cost model of one engine as its steps correct it, and the sums of both sides."""

    def __init__(self, start: CostModel | None) -> None:
        self.cost = start
        self.predicted = 0.0
        self.taken = 0.0
        self._first = start or ()

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """A planned step was computed, and its result says how long that took."""
        self.taken += result.seconds
        if self.cost is None or not (result.seconds and plan.work):
            return  # a step that only forgets something says nothing of others
        load, encoding = Load.of(plan), sum(result.encode_seconds)
        self.predicted += self.cost.predict(load)
        # Tiles and the positions that show them come together; the encoder's time tells them apart.
        self._correct(load._replace(tiles=0), result.seconds - encoding)
        if load.tiles:
            self._correct(Load(steps=0, tiles=load.tiles), encoding)

    def _correct(self, load: Load, seconds: float) -> None:
        """Normalised least mean squares: the error is put down to the parts of the prediction by
        their squares. No coefficient gets to 0, and those of what is not in the load stay."""
        assert self.cost is not None
        parts = self.cost.parts(load)
        predicted = sum(parts)
        most = _LARGEST_ERROR * predicted
        error = min(max(seconds - predicted, -most), most)
        gain = _RATE * error / sum(part * part for part in parts)
        self.cost = CostModel(
            *(
                min(max(value * (1 + gain * part), first / _RANGE), first * _RANGE)
                for value, part, first in zip(self.cost, parts, self._first, strict=True)
            )
        )


class Allowance:
    """Seconds of one step that prompts and pictures may take, going down as they are planned.

    Whatever it is, the first to ask gets one position, and one tile if that position needs it: so
    every step that could go on with a prompt does. One that is ``free`` bounds nothing until a
    prompt ends: who has its first token in this step does not wait for the prompts of others.
    """

    __slots__ = ("_computed", "_cost", "_encoded", "_free", "_left")

    def __init__(
        self, cost: CostModel | None = None, seconds: float = math.inf, *, free: bool = False
    ) -> None:
        self._cost = cost
        self._left = seconds
        self._free = free
        self._computed = False
        self._encoded = False

    @classmethod
    def beside(cls, cost: CostModel, budget: float, contexts: Iterable[int]) -> "Allowance":
        """What is left of a budget in seconds beside rows that generate behind so many tokens;
        never less than a share of what these take, so that prompts get on beside any number."""
        contexts = list(contexts)
        rows = cost.predict(Load(rows=len(contexts), reads=sum(contexts)))
        return cls(cost, max(budget - rows, rows * _LEAST_SHARE), free=not contexts)

    def fit(self, start: int, count: int) -> int:
        """How many of ``count`` positions from ``start`` on there is time for."""
        cost = self._cost
        if cost is None or self._free:
            return count
        left = max(self._left - cost.rows, 0.0)
        # left = slope * n + pairs / 2 * n²
        slope = cost.tokens + cost.pairs * (start + 0.5)
        most = int(2 * left / (slope + math.sqrt(slope * slope + 2 * cost.pairs * left)))
        return min(count, max(most, 0 if self._computed else 1))

    def take(self, start: int, count: int) -> None:
        """These positions are planned."""
        self._computed = True
        if self._cost is not None:
            self._left -= self._seconds(self._cost, start, count)

    def end_prompt(self) -> None:
        """With the positions just planned a prompt ends."""
        self._free = False

    def fits_tile(self, start: int, before: int) -> bool:
        """Whether there is time for a tile and, behind ``before`` positions from ``start`` on, for
        the first that shows it."""
        if self._cost is None or self._free or not (before or self._computed or self._encoded):
            return True
        return self._cost.tiles + self._seconds(self._cost, start, before + 1) <= self._left

    def take_tile(self) -> None:
        """A tile is planned."""
        self._encoded = True
        if self._cost is not None:
            self._left -= self._cost.tiles

    @staticmethod
    def _seconds(cost: CostModel, start: int, count: int) -> float:
        return cost.rows + cost.tokens * count + cost.pairs * count_pairs(start, count)


def step_budget(settings: EngineSettings, device: str) -> float:
    """Seconds that a step may take while somebody generates; infinite: any time."""
    budget = settings.step_budget_ms
    if budget < 0:
        budget = _BUDGET["cuda" if device.startswith("cuda") else "cpu"]
    return budget / 1000 or math.inf
