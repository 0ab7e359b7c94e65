"""What planning and committing one step costs, without a model.

Fills the batch with text rows that all generate, then times plan and commit apart from the rest;
prints JSON: microseconds per step at the median and the 99th percentile.

    python -m benchmarks.scheduler --rows 256 --steps 2000
"""

import argparse
import json
import platform
import statistics
import time

from engine.plan import Sampled, StepResult
from engine.scheduler import Scheduler
from wire.geometry import PromptFormat, VisionGeometry
from wire.messages import EngineRequest, Ready
from wire.sampling import SamplingParams
from wire.settings import EngineSettings


def build(rows: int, prompt: int, steps: int) -> Scheduler:
    """A scheduler with ``rows`` requests that need more than ``steps`` steps each."""
    length = prompt + steps + 100
    settings = EngineSettings(max_num_seqs=rows, max_num_batched_tokens=max(2048, rows))
    ready = Ready(
        geometry=VisionGeometry(448, 256),
        prompt_format=PromptFormat("hf", None, False),
        max_model_len=length + 1,
        vocab_size=1000,
        eos_token_ids=(0,),
        block_size=settings.block_size,
        blocks_total=rows * (length // settings.block_size + 2),
        device="none",
        dtype="none",
        attention="none",
        parameters=0,
    )
    scheduler = Scheduler(settings, ready)
    for row in range(rows):
        sampling = SamplingParams(max_tokens=length - prompt)
        scheduler.add(EngineRequest(f"request-{row}", [1] * prompt, sampling))
    return scheduler


def measure(rows: int, prompt: int, steps: int) -> dict[str, object]:
    """Time ``steps`` steps in which every row generates one token."""
    scheduler = build(rows, prompt, steps)
    planning: list[float] = []
    committing: list[float] = []
    while len(planning) < steps:
        begin = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        result = StepResult(plan.step, [Sampled(work.id, 7) for work in plan.work if work.sample])
        executed = time.perf_counter()
        scheduler.commit(result)
        end = time.perf_counter()
        if len(result.sampled) == rows and not plan.new_rows:
            planning.append(planned - begin)
            committing.append(end - executed)
    whole = [a + b for a, b in zip(planning, committing, strict=True)]
    return {
        "rows": rows,
        "steps": steps,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "us_per_step": {
            name: {
                "p50": round(statistics.median(times) * 1e6, 1),
                "p99": round(statistics.quantiles(times, n=100)[98] * 1e6, 1),
            }
            for name, times in (("plan", planning), ("commit", committing), ("both", whole))
        },
    }


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.rows, arguments.prompt, arguments.steps), indent=2))


if __name__ == "__main__":
    main()
