"""How evenly streams go on while pictures arrive, with each of several step budgets.

Runs an engine in this process, without HTTP. Streams generate; then pictures arrive at fixed
times, whether those before are answered or not. From the first arrival to the last picture's answer
it takes the time between any two tokens of a stream, and from each picture to its first token. The
same traffic goes through the same loaded model once for each budget and round, in turns. Prints
JSON: milliseconds.

    python -m benchmarks.latency --model FOLDER --budgets 0,200 --pictures 4 --tiles 5 --every 3
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from engine.core import EngineCore
from engine.runner import ModelRunner
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo/checkpoint/hf"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Tokens, tiles and seconds of what is sent; names begin with ``label``."""

    label: str
    streams: int
    pictures: int
    tiles: int
    text: int
    answer: int
    every: float


def request(
    core: EngineCore, name: str, text: int, tiles: int, answer: int, picture: str = ""
) -> None:
    """Ask for ``answer`` tokens behind text and a picture of so many tiles. The request called
    ``picture`` may have shown the same one, behind the same half of the text."""
    ready = core._ready
    length = tiles * ready.geometry.tokens_per_tile
    picture, half = picture or name, text // 2

    def words(seed: str, count: int) -> list[int]:
        source = torch.Generator().manual_seed(hash(seed) % 2**32)
        return torch.randint(100, ready.vocab_size // 2, (count,), generator=source).tolist()

    items = [VisionItem(picture.encode(), half, length, tiles, 0)] if tiles else []
    prompt = words(picture, half) + [0] * length + words(f"{name}, behind", text - half)
    sampling = SamplingParams(temperature=0.0, max_tokens=answer)
    buffers = [bytes(tiles * ready.geometry.tile_bytes)] * len(items)
    core.add(EngineRequest(name, prompt, sampling, items), buffers)


def measure(core: EngineCore, traffic: Traffic) -> dict[str, Any]:
    """Serve the traffic; milliseconds."""
    streams = [f"{traffic.label} stream {number}" for number in range(traffic.streams)]
    pictures = [f"{traffic.label} picture {number}" for number in range(traffic.pictures)]
    for name in streams:
        request(core, name, traffic.text, 0, 10_000)
    last: dict[str, float] = {}
    while len(last) < len(streams):
        report = core.step()
        assert report is not None
        last |= dict.fromkeys((output.id for output in report.outputs), time.perf_counter())
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    gaps: list[float] = []
    ended = 0
    before = core._stats()
    begun = time.perf_counter()
    while ended < len(pictures):
        now = time.perf_counter()
        while len(sent) < len(pictures) and now >= begun + len(sent) * traffic.every:
            name = pictures[len(sent)]
            sent[name] = begun + len(sent) * traffic.every
            request(core, name, traffic.text, traffic.tiles, traffic.answer)
        report = core.step()
        now = time.perf_counter()
        assert report is not None
        for output in report.outputs:
            assert output.finish_reason != "error", output.error
            if output.id in last:
                gaps.append(now - last[output.id])
                last[output.id] = now
            else:
                first.setdefault(output.id, now)
                ended += output.finish_reason is not None
    seconds = time.perf_counter() - begun
    after = core._stats()
    core.abort(streams)
    while core.step() is not None:
        pass
    waits = [first[name] - sent[name] for name in pictures]
    predicted = after.predicted_seconds - before.predicted_seconds
    return {
        "between_tokens": spread(gaps),
        "first_token_of_pictures": spread(waits),
        "seconds": round(seconds, 2),
        "stream_tokens_per_second": round(len(gaps) / seconds, 2),
        "steps": after.steps - before.steps,
        "time_over_prediction": round(
            (after.step_seconds - before.step_seconds) / predicted, 3
        ),
    }  # fmt: skip


def spread(seconds: list[float]) -> dict[str, float]:
    """Of a list of durations, in milliseconds."""
    cuts = statistics.quantiles(seconds * 2, n=100, method="inclusive")  # of one too
    points = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in points.items()}


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budgets", default="0,200", help="milliseconds; 0: none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between arrivals")
    parser.add_argument(
        "--text", type=int, default=64, help="tokens of each prompt beside pictures"
    )
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer to a picture")
    arguments = parser.parse_args()
    settings = EngineSettings(
        model=str(arguments.model), device=arguments.device, enable_prefix_caching=False,
        kv_cache_memory=1 << 30,
    )  # fmt: skip
    began = time.perf_counter()
    runner = ModelRunner(settings)
    ready = runner.ready()
    started = time.perf_counter() - began
    cost = runner.cost()
    assert cost is not None
    budgets: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for budget in arguments.budgets.split(","):
            core = EngineCore(
                dataclasses.replace(settings, step_budget_ms=float(budget)), runner, ready
            )
            traffic = Traffic(
                f"{number} {budget}", arguments.streams, arguments.pictures, arguments.tiles,
                arguments.text, arguments.answer, arguments.every,
            )  # fmt: skip
            budgets.setdefault(budget, []).append(measure(core, traffic))
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": ready.device,
        "dtype": ready.dtype,
        "parameters": ready.parameters,
        "arguments": vars(arguments) | {"model": arguments.model.name},
        "seconds_to_load": round(started, 2),
        "cost_ms_at_the_start": {
            name: round(1000 * value, 6) for name, value in cost._asdict().items()
        },
        "budgets_ms": budgets,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
