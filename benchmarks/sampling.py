"""What drawing one token per row costs, feature by feature, on random logits and one CPU thread.

Prints JSON: milliseconds per step, the best of several rounds.

    python -m benchmarks.sampling --vocab 151674 --rows 1 16
"""

import argparse
import json
import platform
import time

import numpy as np
import torch

from engine.sampling.base import SampleRow
from engine.sampling.logprobs import logprobs
from engine.sampling.sampler import sample
from wire.sampling import SamplingParams

FEATURES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7),
    "top_p": SamplingParams(temperature=0.7, top_p=0.9),
    "top_k": SamplingParams(temperature=0.7, top_k=50),
    "top_k and top_p": SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    "min_p": SamplingParams(temperature=0.7, min_p=0.05),
    "repetition_penalty": SamplingParams(temperature=0.0, repetition_penalty=1.1),
    "presence_penalty": SamplingParams(temperature=0.0, presence_penalty=0.5),
    "bad_words": SamplingParams(temperature=0.0, bad_words=((5,), (7, 9))),
    "logprobs": SamplingParams(temperature=0.0, logprobs=20),
}


def measure(params: SamplingParams, count: int, vocab: int, rounds: int) -> float:
    """Milliseconds for ``count`` rows with 600 tokens of prompt and 200 of output each."""
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(0)) * 3
    rows = [SampleRow(params, np.arange(600), np.arange(200)) for _ in range(count)]
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        logprobs(logits, sample(logits, rows), rows)
        best = min(best, time.perf_counter() - begin)
    return round(best * 1e3, 3)


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_674)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        f"{count} rows": {
            name: measure(params, count, arguments.vocab, arguments.rounds)
            for name, params in FEATURES.items()
        }
        for count in arguments.rows
    }
    about = {"vocab": arguments.vocab, "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps(about | {"ms_per_step": found}, indent=2))


if __name__ == "__main__":
    main()
