"""An engine that misbehaves when it is told to: ``python -m tests.e2e.faulty_engine FILE FD``.

While FILE exists, it holds the JSON of a ``Fault``, and the first step that is meant suffers it.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine.__main__ as engine_main
from engine.plan import StepPlan
from engine.runner import ModelRunner
from wire.messages import Progress
from wire.settings import EngineSettings

# Seconds that are added to each step, so that streams overlap for a while; and while a fault waits
# for whom it is meant.
PACE, SLOW = 0.01, 0.2


@dataclass(frozen=True)
class Fault:
    """``how`` a step fails that computes at least ``rows`` rows, and draws for one with ``seed``.

    ``once``: the file goes before the fault comes; else every such step suffers it.
    """

    how: str
    rows: int = 1
    seed: int | None = None
    once: bool = True


class FaultyRunner(ModelRunner):
    """Fails as the file says; the warm-up succeeds."""

    file: Path | None = None

    def _compute(self, plan: StepPlan) -> Any:
        begun = super()._compute(plan)
        fault = self._fault()
        if self.file is None:
            return begun
        seeds = [self._rows[work.id].sampling.seed for work in plan.work]
        drawing = np.repeat(seeds, [work.sample + len(work.speculated) for work in plan.work])
        if fault is None or len(seeds) < fault.rows or fault.seed not in [None, *drawing]:
            time.sleep(PACE if fault is None else SLOW)
            return begun
        if fault.once:
            self.file.unlink()
        if fault.how == "nan":
            assert begun.logits is not None
            begun.logits[torch.from_numpy(drawing == fault.seed)] = torch.nan
        else:
            fail(fault.how)
        return begun

    def _fault(self) -> Fault | None:
        with contextlib.suppress(FileNotFoundError):
            return Fault(**json.loads(self.file.read_text())) if self.file else None
        return None


def fail(how: str) -> None:
    if how == "raise":
        raise RuntimeError("told to fail")
    if how == "device memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if how == "main memory":
        torch.empty(1 << 60)  # RuntimeError, by torch's own allocator
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def load(settings: EngineSettings, progress: Callable[[Progress], None]) -> FaultyRunner:
    runner = FaultyRunner(settings, progress)
    runner.file = Path(sys.argv[2])
    return runner


if __name__ == "__main__":
    sys.argv[1:] = reversed(sys.argv[1:])  # the descriptor comes first for the engine's own main
    engine_main.load = load  # type: ignore[assignment]
    engine_main.main()
