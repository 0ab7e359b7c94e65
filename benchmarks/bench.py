"""The cases of ``benchmarks.compare`` in about five minutes, our server alone, offline.

    python -m benchmarks.bench --out bench.json        (or: make bench)

Serves the demo model, then InternVL3-1B's shape with random weights, which are made first in a
folder that is deleted afterwards (2 GB; ``--work`` keeps it). Prints the tables.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cases import CASES, our_client
from benchmarks.compare import Comparison, end_in_order, facts, our_server
from benchmarks.table import (
    OTHERS,
    PER_TOKEN,
    THROUGHPUT,
    TTFT,
    Results,
    aligned,
    figures,
    notes,
)
from tests.checkpoints import INTERNVL3_1B, make_checkpoint

ROUNDS = 2


def make_1b(folder: Path) -> Path:
    """A checkpoint of InternVL3-1B's shape; weights that are there already are used again."""
    if not (folder / "model.safetensors").exists():
        make_checkpoint(folder, shape=INTERNVL3_1B, dtype=torch.bfloat16)
    give_texts(folder / "tokenizer.json", INTERNVL3_1B.vocab)
    return folder


def give_texts(file: Path, size: int) -> None:
    """Give a text to every token of a vocabulary that the tokenizer lacks: random weights write
    them, and what has no text does not reach the client when it is generated."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    known = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab |= {f"~{token}": token for token in range(size) if token not in known}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def main() -> None:
    """Read the command line, write the result, print its tables."""
    end_in_order()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--work", type=Path, help="folder for the checkpoint, which is kept there")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    cases = [case.at_most(max(2, case.requests // 2)) for case in CASES]
    with tempfile.TemporaryDirectory() as folder:
        large = make_1b(given.work or Path(folder) / "1b")
        comparison = Comparison(cases, our_client, int(time.time()), given.out, facts("our own"))
        for name, model in (("demo model", None), ("1B shape", large)):
            for number in range(ROUNDS):
                comparison.measure(our_server(model, name), number)
    results = Results(comparison.found)
    found = "\n".join(notes(results)), figures(results, (THROUGHPUT, TTFT, PER_TOKEN, OTHERS))
    print(aligned("\n\n".join(found)))


if __name__ == "__main__":
    main()
