"""What a step of the engine costs beside the model: planning, batch, draw, commit and report.

Loads a checkpoint, lets rows generate greedily, and takes the time of each step apart: in the
model's forward pass and its logits, and in everything else, down to the bytes written to the front
end. Prints JSON: milliseconds per step at the median, and what share the rest has.

    python -m benchmarks.loop --model DIR --rows 1 4 16 64
"""

import argparse
import collections
import contextlib
import functools
import json
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.core import EngineCore
from engine.runner import ModelRunner
from wire.channel import Channel
from wire.messages import EngineRequest, ToEngine
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

# A step of single tokens is computed by those in the middle where there is one call for it.
_MODEL = ("forward", "hidden", "draw", "logits")


class Clock:
    """Adds up the time in functions that it stands around."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = collections.defaultdict(float)

    def wrap(self, owner: object, name: str) -> None:
        """Count the calls of a method of one object."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[name] += time.perf_counter() - began

        setattr(owner, name, timed)


def measure(
    core: EngineCore, channel: Channel[ToEngine], clock: Clock, rows: int, prompt: int, steps: int
) -> dict[str, Any]:
    """``steps`` steps in which each of ``rows`` rows generates a token."""
    for row in range(rows):
        sampling = SamplingParams(max_tokens=steps + rows + 9, temperature=0.0)
        ids = [(row * 977 + place * 31) % 1000 for place in range(prompt)]
        core.add(EngineRequest(f"chatcmpl-{rows}-{row}-{'0' * 20}", ids, sampling))
    found: list[dict[str, float]] = []
    while core.has_work:
        clock.spent.clear()
        began = time.perf_counter()
        report = core.step()
        stepped = time.perf_counter()
        if report is None:
            continue
        channel.send(report)
        whole = time.perf_counter() - began
        model = sum(clock.spent[name] for name in _MODEL)
        parts = {
            "plan": clock.spent["plan"],
            "begin": clock.spent["begin"] - model,
            "draw": clock.spent["sample"] + clock.spent["finish"],
            "commit": clock.spent["commit"],
            "report": time.perf_counter() - stepped,
        }
        others = {"other": whole - model - sum(parts.values())}
        if sum(len(output.token_ids) for output in report.outputs) == rows:
            found.append({"step": whole, "model": model, "rest": whole - model} | parts | others)
    found = found[1 : steps + 1]  # the first may hold the end of the prompts
    middle = {key: statistics.median(each[key] for each in found) * 1e3 for key in found[0]}
    return {
        "rows": rows,
        "steps": len(found),
        "ms_per_step": {key: round(value, 3) for key, value in middle.items()},
        "percent_beside_the_model": round(100 * middle["rest"] / middle["step"], 2),
    }


@contextlib.contextmanager
def front_end() -> Iterator[Channel[ToEngine]]:
    """A channel to one that reads everything and does nothing."""
    ours, theirs = socket.socketpair()
    # In a process of its own, as the front end is: a thread would take the interpreter.
    reader = subprocess.Popen(["/bin/cat"], stdin=theirs, stdout=subprocess.DEVNULL)
    theirs.close()
    try:
        with ours:
            yield Channel(ours, ToEngine)
    finally:
        reader.wait()  # it has read to the end


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args(argv)
    settings = EngineSettings(
        model=str(arguments.model), max_num_seqs=max(arguments.rows), max_model_len=1024
    )
    runner = ModelRunner(settings, lambda _: None)
    core = EngineCore(settings, runner, runner.ready())
    clock = Clock()
    for owner, names in (
        (runner, ("begin", "sample", "finish")),
        (runner._single, ("hidden", "draw") if runner._single else ()),
        (runner._model, ("forward", "draw", "logits")),
        (core._scheduler, ("plan", "commit")),
    ):
        for name in names:
            clock.wrap(owner, name)
    with front_end() as channel:
        cases = [
            measure(core, channel, clock, rows, arguments.prompt, arguments.steps)
            for rows in arguments.rows
        ]
    answer = {
        "cases": cases,
        "threads": torch.get_num_threads(),
        "device": runner.ready().device,
        "dtype": runner.ready().dtype,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
