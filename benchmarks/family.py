"""``internvl verify`` for every size, format and precision of InternVL3, with random weights.

    python -m benchmarks.family --work DIR --out benchmarks/results/family.json
    python -m benchmarks.family --work DIR --sizes 1B 2B --full --precisions bfloat16 --out ...
    python -m benchmarks.family --table --out benchmarks/results/family.json

A checkpoint is made in DIR, verified and deleted. Without ``--full`` models are scaled down: true
flags, heads, head sizes and widths of the encoder; four layers of each part; a quarter of the
decoder's widths, tiles of 56 pixels and a small vocabulary. Those are compared in this process, as
the command does in several. What the file already holds of other rows stays. ``--table`` prints its
rows for docs/models.md.
"""

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from engine.compare import compare
from engine.verify import Watched, compute
from server.verify import CASES_OF, prepared
from tests.checkpoints import INTERNVL3, Shape, in_four_bits, make_checkpoint
from wire.cases import CASES, OURS, Case, Cases, Outcome
from wire.loading import load

FORMATS = ("hf", "chat")
GROUP = 128
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--quantization", "int8"),
    "bnb-8bit": ("--quantization", "bnb-8bit", "--dtype", "bfloat16"),
    "bnb-4bit": ("--quantization", "bnb-4bit", "--dtype", "bfloat16"),
    "AWQ": ("--dtype", "float32"),
}
LAYERS, PART, VOCAB = 4, 4, 1024
# Blocks of 64 numbers and groups of 128 shall not span rows, in the scaled sizes neither.
STEP = 128
# One request at a time.
SMALL = (
    *("--threads", "1", "--max-num-seqs", "1", "--max-model-len", "4096", "--step-budget-ms", "0"),
    *("--kv-cache-memory", str(2 << 30), "--max-num-encoder-tiles", "2"),
    *("--max-num-batched-tokens", "512"),
)


def scaled(shape: Shape) -> Shape:
    """The shape with less of everything that is only more of the same."""

    def narrow(width: int) -> int:
        return round(width / PART / STEP) * STEP

    return dataclasses.replace(
        shape,
        vision_layers=LAYERS,
        layers=LAYERS,
        size=narrow(shape.size),
        mlp=narrow(shape.mlp),
        vocab=VOCAB,
        image_size=56,
        tile_size=56,
    )


def made(folder: Path, shape: Shape, format: str, precision: str) -> Path:
    """A checkpoint in bf16, or in fp32 and four bits."""
    if format == "hf" and shape.backbone == "InternLM2ForCausalLM":
        shape = dataclasses.replace(shape, backbone="LlamaForCausalLM")  # as it is converted
    if precision != "AWQ":
        return make_checkpoint(folder, format=format, shape=shape, dtype=torch.bfloat16)
    bare = make_checkpoint(folder, format=format, shape=shape, weights=False)
    text = "llm_config" if format == "chat" else "text_config"
    values = json.loads((bare / "config.json").read_text("utf-8"))[text]
    values["quantization_config"] = {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True
    }  # fmt: skip
    return make_checkpoint(
        folder,
        format=format,
        shape=shape,
        dtype=torch.bfloat16,
        change=lambda tensors: in_four_bits(tensors, GROUP),
        config={text: values},
    )


def make(*arguments: Any, apart: bool) -> None:
    """``made``; ``apart`` in a process of its own, whose memory goes with it."""
    if not apart:
        made(*arguments)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
        maker.submit(made, *arguments).result()


def verified(folder: Path, precision: str, tokens: int, work: Path) -> list[Outcome]:
    """What ``internvl verify`` finds, of pictures with three tiles in all."""
    out = work / "found.json"
    flags = [*PRECISIONS[precision], "--tokens", str(tokens), "--out", str(out), *SMALL]
    flags += ["--cases", "text", "picture", "frames"]
    command = [sys.executable, "-m", "server", "verify", str(folder), *flags]
    out.unlink(missing_ok=True)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not out.exists():
        raise SystemExit(f"{folder.name}, {precision}: {done.stderr[-2000:]}")
    outcomes = json.loads(out.read_text("utf-8"))["outcomes"]
    return msgspec.convert(outcomes, list[Outcome])


_prepared: dict[tuple[Any, ...], list[Case]] = {}


def verified_here(folder: Path, precision: str, tokens: int, work: Path) -> list[Outcome]:
    """The same without processes to start, for models that take less time than those."""
    pairs = [*PRECISIONS[precision], *SMALL]
    flags = {
        flag[2:].replace("-", "_"): value
        for flag, value in zip(pairs[::2], pairs[1::2], strict=True)
    }
    settings = load(flags | {"model": str(folder), "media_workers": "1"}, {})
    runner = Watched(settings.engine)
    ready = runner.ready()
    like = (ready.prompt_format, ready.geometry, tokens)  # of all that the cases depend on
    if like not in _prepared:
        # Tiles and prompts of the others depend on neither size nor precision.
        cases = asyncio.run(prepared(settings, ready, list(CASES_OF), tokens))
        _prepared[like] = [case for case in cases if case.computed]
    (work / CASES).write_bytes(msgspec.msgpack.encode(Cases(ready, _prepared[like])))
    save_file(compute(settings.engine, runner, _prepared[like]), work / OURS)
    del runner
    return compare(settings.engine, folder, work).outcomes


def short(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The worst of all cases; means of what is a share."""
    logits = [one.logits for one in outcomes if one.logits is not None]

    def worst(name: str) -> float:
        return float(f"{max(getattr(one, name) for one in logits):.3g}")

    def mean(name: str) -> float:
        return float(f"{sum(getattr(one, name) for one in logits) / len(logits):.4g}")

    return {
        "passed": not any(one.wrong for one in outcomes),
        "largest_error": worst("largest"),
        "of_deviation": worst("relative"),
        "same_top_token": mean("same_top"),
        "ours_from_exact": worst("ours_exact"),
        "theirs_from_exact": worst("theirs_exact"),
        "divergence": worst("divergence"),
        "agreement": mean("agreement"),
        "greedy": [sum(one.greedy for one in outcomes), sum(one.tokens for one in outcomes)],
        "wrong": [f"{one.name}: {text}" for one in outcomes for text in one.wrong],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| size | shape | format | precision | largest logit error | of their deviation | "
        "from float32: ours / transformers' | greedy tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        far = "" if not row["theirs_from_exact"] else (
            f"{row['ours_from_exact']:.2g} / {row['theirs_from_exact']:.2g}"
        )  # fmt: skip
        lines.append(
            f"| {row['size']} | {row['shape']} | {row['format']} | {row['precision']} | "
            f"{row['largest_error']:.2g} | {row['of_deviation']:.1g} | {far} | "
            f"{row['greedy'][0]} of {row['greedy'][1]} |"
            + ("" if row["passed"] else " **out of bounds** |")
        )
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    places = ((list(INTERNVL3), "size"), (["full", "scaled"], "shape"),
              (list(FORMATS), "format"), (list(PRECISIONS), "precision"))  # fmt: skip
    return tuple(names.index(row[name]) for names, name in places)


def main() -> int:
    """Make, verify, delete, write; 1 if something is out of bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=INTERNVL3, default=list(INTERNVL3))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--full", action="store_true", help="published shapes")
    parser.add_argument("--tokens", type=int, default=8, help="greedy tokens of each case")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    given = parser.parse_args()
    rows = json.loads(given.out.read_text("utf-8"))["rows"] if given.out.exists() else []
    if given.table:
        print(table(rows))
        return 0
    torch.set_num_threads(1)
    git = ["git", "log", "-1", "--format=%h"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    passed = True
    for size in given.sizes:
        shape = INTERNVL3[size] if given.full else scaled(INTERNVL3[size])
        for format in given.formats:
            for precision in given.precisions:
                packed = precision == "AWQ"
                folder = given.work / f"{size}-{format}{'-awq' if packed else ''}"
                if not (folder / "model.safetensors").exists():
                    make(folder, shape, format, precision, apart=given.full)
                row = {"size": size, "shape": "full" if given.full else "scaled"}
                row |= {"format": format, "precision": precision}
                verify = verified if given.full else verified_here
                row |= short(verify(folder, precision, given.tokens, given.work))
                row |= {"commit": commit, "date": time.strftime("%Y-%m-%d")}
                rows = [other for other in rows if _key(other) != _key(row)]
                rows = sorted([*rows, row], key=_key)
                given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
                print(json.dumps(row), flush=True)
                passed = passed and row["passed"]
            for folder in given.work.glob(f"{size}-{format}*"):
                shutil.rmtree(folder)
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
