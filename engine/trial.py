"""Short steps at the start of an engine, from whose times the cost model gets its coefficients.

Each case differs from an earlier one in one thing: the difference of their times is its cost.
What serving shows to be wrong is corrected later (engine.cost.Pace).
"""

import logging

from engine.core import Runner
from engine.cost import CostModel
from engine.plan import EncodeItem, NewRow, StepPlan, Work
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

_ROWS = 8
_CHUNK = 128  # positions of a prompt
_CONTEXT = 1024
# Each case is run until it has taken so many seconds, at most so often; the shortest run counts.
_SECONDS = 0.02
_ROUNDS = 4
# A difference that noise has swallowed is taken for this part of the whole.
_LEAST = 0.01
_PICTURE = b"trial"


class Trial:
    """Runs steps that no request asked for; ``runner`` must have no rows."""

    def __init__(self, runner: Runner, settings: EngineSettings) -> None:
        ready = runner.ready()
        self._runner = runner
        length = min(ready.max_model_len, ready.blocks_total * ready.block_size)
        self._chunk = max(1, min(_CHUNK, settings.max_num_batched_tokens, length // 2))
        self._context = min(_CONTEXT, length - self._chunk)
        self._rows = min(_ROWS, settings.max_num_seqs, settings.max_num_batched_tokens)
        self._blocks = list(range(-(-(self._context + self._chunk) // ready.block_size)))
        self._names: list[str] = []
        self._dropped: list[bytes] = []
        self._steps = 0

    def fit(self) -> CostModel:
        """The cost model of this machine at this moment."""
        rows, chunk, context = self._rows, self._chunk, self._context
        self._time(1, 0, 1)  # the first steps may wait for memory and for files to be read
        one, many = self._time(1, 0, 1), self._time(rows, 0, 1)
        late = self._time(rows, context, 1)
        prompt, behind = self._time(1, 0, chunk), self._time(1, context, chunk)
        tile = self._time(1, 0, 1, tiles=1) - one
        self._execute(StepPlan(self._steps, [], [], [], self._dropped, self._names))
        row = _coefficient(one, many, rows - 1)
        cost = CostModel(
            steps=max(one - row, _LEAST * one),
            rows=row,
            reads=_coefficient(many, late, rows * context),
            tokens=_coefficient(one, prompt, chunk),
            pairs=_coefficient(prompt, behind, chunk * context),
            tiles=max(tile, _LEAST * one),
        )
        logger.debug(
            "cost_ms step=%.3g row=%.3g read=%.3g token=%.3g pair=%.3g tile=%.3g",
            *(1000 * seconds for seconds in cost),
        )
        return cost

    def _time(self, rows: int, start: int, count: int, tiles: int = 0) -> float:
        """Seconds of a step in which so many rows compute so many positions."""
        runs: list[float] = []
        while sum(runs) < _SECONDS and len(runs) < _ROUNDS:
            runs.append(self._run(rows, start, count, tiles))
        return min(runs)

    def _run(self, rows: int, start: int, count: int, tiles: int) -> float:
        ids, sampling, blocks = [0] * (start + count), SamplingParams(), self._blocks
        names = [f"trial {self._steps} {row}" for row in range(rows)]
        # All rows share the blocks: what they read and write there is nothing anyway. The first
        # row gets them as new ones, so that the runner clears them.
        plan = StepPlan(
            step=self._steps,
            new_rows=[
                NewRow(name, ids, len(ids), sampling, [], blocks if row else [])
                for row, name in enumerate(names)
            ],
            work=[
                Work(name, start, count, [] if row else blocks, True)
                for row, name in enumerate(names)
            ],
            encode=[EncodeItem(_PICTURE, names[0], 0, tiles)] if tiles else [],
            drop=self._dropped,
            removed=self._names,
        )
        self._names, self._dropped = names, [_PICTURE] if tiles else []
        if tiles:
            item = VisionItem(_PICTURE, 0, 0, tiles, 0)
            tile_bytes = self._runner.ready().geometry.tile_bytes
            request = EngineRequest(names[0], ids, sampling, [item])
            self._runner.upload(request, [bytes(tiles * tile_bytes)])
        return self._execute(plan)

    def _execute(self, plan: StepPlan) -> float:
        self._runner.begin(plan)
        self._runner.sample()
        result = self._runner.finish()
        self._steps += 1
        return result.seconds


def _coefficient(without: float, having: float, units: int) -> float:
    """Seconds of one of ``units``, which only the second of two steps has."""
    return max(having - without, _LEAST * having) / max(units, 1)
