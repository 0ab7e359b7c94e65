"""How fast weights come from a disk into memory, with reads ahead of the loader and without.

    python -m benchmarks.loading CHECKPOINT --rounds 3 --out result.json

"cold": the files are not in this machine's page cache (whatever a disk keeps in its own); "cached":
they are. Prints JSON: seconds per round, the median in GB/s, and the most memory held beside the
weights.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import model.weights
from model import build_model, load_config
from model.readahead import read_ahead

WAYS: dict[str, Callable[[Path], Any]] = {
    "as mapped": lambda _: contextlib.nullcontext(),
    "read ahead": read_ahead,
}


def main() -> None:
    """Parse the command line and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.checkpoint, arguments.rounds)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """The ways in turn, so that what changes with time reaches all of them."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    seconds: dict[str, list[float]] = {}
    beside = 0
    for state in ("cold", "cached"):
        for _ in range(rounds):
            for name, way in WAYS.items():
                if state == "cold":
                    _forget(files)
                taken, most = _load(folder, way)
                seconds.setdefault(f"{name}, {state}", []).append(round(taken, 2))
                beside = max(beside, most)
    rates = {name: round(size / 1e9 / statistics.median(s), 2) for name, s in seconds.items()}
    return {
        "bytes": size,
        "seconds": seconds,
        "GB/s": rates,
        "most bytes beside the weights": beside,
    }


def _load(folder: Path, way: Callable[[Path], Any]) -> tuple[float, int]:
    """Seconds, and bytes held beside the weights at most."""
    model.weights.read_ahead = way  # type: ignore[assignment]
    gc.collect()
    before, began = _anonymous(), time.perf_counter()
    seen: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((time.perf_counter(), _anonymous() - before - done))

    config = load_config(folder)
    device, dtype = torch.device("cpu"), getattr(torch, config.dtype)
    build_model(config, folder, device=device, dtype=dtype, progress=progress)
    return seen[-1][0] - began, max(most for _, most in seen)


def _anonymous() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text("ascii")
    return next(int(row.split()[1]) << 10 for row in status.splitlines() if "RssAnon" in row)


def _forget(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
