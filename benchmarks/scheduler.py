"""What planning and committing one step costs, and finding a cached prefix, without a model.

Fills the batch with text rows that all generate, then times plan and commit apart from the rest;
the same under each scheduling policy with requests of eight tenants and priorities waiting; then
names and looks up the blocks of a long prompt with pictures. Prints JSON: microseconds per
step at the median and the 99th percentile, and per prompt at the median.

    python -m benchmarks.scheduler --rows 256 --steps 2000
"""

import argparse
import itertools
import json
import platform
import statistics
import time

from engine.blocks import BlockPool
from engine.plan import Sampled, StepResult
from engine.prefix import extend_digests
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.waiting import QUEUES
from wire.geometry import PromptFormat, VisionGeometry
from wire.messages import EngineRequest, Ready, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings


def build(rows: int, prompt: int, steps: int, policy: str, waiting: int) -> Scheduler:
    """A scheduler with ``rows`` requests that need more than ``steps`` steps each, and others."""
    length = prompt + steps + 100
    settings = EngineSettings(
        max_num_seqs=rows, max_num_batched_tokens=max(2048, rows), scheduling_policy=policy
    )
    ready = Ready(
        geometry=VisionGeometry(448, 256),
        prompt_format=PromptFormat("hf", None, False),
        max_model_len=length + 1,
        max_positions=length + 1,
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
    for row in range(rows + waiting):
        sampling = SamplingParams(max_tokens=length - prompt)
        request = EngineRequest(
            f"request-{row}",
            [row % 1000] * prompt,
            sampling,
            priority=1 + row % 8 if row >= rows else 0,
            tenant=b"%d" % (row % 8),
        )
        scheduler.add(request)
    return scheduler


def measure(
    rows: int, prompt: int, steps: int, policy: str = "fcfs", waiting: int = 0
) -> dict[str, object]:
    """Time ``steps`` steps in which every row generates one token."""
    scheduler = build(rows, prompt, steps, policy, waiting)
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


def measure_queue(policy: str, waiting: int) -> dict[str, float]:
    """Time each operation of a queue in which so many of a thousand tenants and priorities wait."""
    queue = QUEUES[policy]()
    sequences = []
    for number in range(waiting):
        name, group = f"request-{number}", number * 7919 % 1000
        request = EngineRequest(
            name, [1] * 9, SamplingParams(), priority=group, tenant=b"%d" % group
        )
        sequences.append(Sequence(request, number, 100))
    taken = waiting // 2
    marks = [time.perf_counter()]
    for sequence in sequences:
        queue.push(sequence)
    marks.append(time.perf_counter())
    for _ in range(taken):
        head = queue.head()
        assert head is not None
        queue.take(head)
    marks.append(time.perf_counter())
    for sequence in list(queue):
        queue.remove(sequence)
    marks.append(time.perf_counter())
    spent = (end - begin for begin, end in itertools.pairwise(marks))
    counts = {"push": waiting, "take": taken, "remove": waiting - taken}
    return {
        name: round(seconds / count * 1e6, 2)
        for (name, count), seconds in zip(counts.items(), spent, strict=True)
    }


def measure_prefix(tokens: int, pictures: int, rounds: int = 21) -> dict[str, object]:
    """Time the digests of a prompt's blocks, and finding all of them in the pool."""
    size = EngineSettings().block_size
    prompt = [n % 1000 for n in range(tokens)]
    length = tokens // (2 * pictures)
    items = [VisionItem(b"%32d" % n, 2 * n * length, length, 1, n) for n in range(pictures)]
    naming, finding = [], []
    for _ in range(rounds):
        digests: list[bytes] = []
        begin = time.perf_counter()
        extend_digests(digests, prompt, items, size, b"")
        naming.append(time.perf_counter() - begin)
        pool = BlockPool(len(digests))
        blocks = pool.allocate(len(digests)) or []
        for block, digest in zip(blocks, digests, strict=True):
            pool.publish(block, digest)
        begin = time.perf_counter()
        found = pool.match(digests)
        finding.append(time.perf_counter() - begin)
        assert found == blocks
    return {
        "tokens": tokens,
        "pictures": pictures,
        "blocks": tokens // size,
        "us_to_name": round(statistics.median(naming) * 1e6, 1),
        "us_to_find": round(statistics.median(finding) * 1e6, 1),
    }


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--waiting", type=int, default=1000, help="while the policies are compared")
    arguments = parser.parse_args()
    found: dict[str, object] = measure(arguments.rows, arguments.prompt, arguments.steps)
    found["policies"] = {
        policy: {
            "waiting": arguments.waiting,
            "us_per_operation_with_10000_waiting": measure_queue(policy, 10_000),
            "us_per_step": measure(
                arguments.rows, arguments.prompt, arguments.steps, policy, arguments.waiting
            )["us_per_step"],
        }
        for policy in ("fcfs", "priority", "fair")
    }
    found["prefix"] = [measure_prefix(2048, 4), measure_prefix(32768, 12)]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
