"""Compare our model with transformers on a published shape of InternVL3, weights random.

    python -m benchmarks.parity --size 1B --work DIR --out result.json

Makes both checkpoint formats in DIR (the 1B: 2 x 1.9 GB, kept for the next run), then compares
logits in fp32 and bf16, greedy tokens through the engine's runner, and our logits between the
formats. The 1B needs about 7 GB of memory and some five minutes of one core. ``--hf`` and
``--chat`` name checkpoints to use instead.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import INTERNVL3, Shape, make_checkpoint
from tests.parity.direct import load, prompt, run
from tests.parity.driver import Driver
from tests.parity.reference import Reference

PROMPTS = {"text": [], "picture": [1], "pictures": [1, 1]}


def main() -> None:
    """Parse the command line and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--size", choices=[name for name in INTERNVL3 if name != "9B"], default="1B"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--hf", type=Path, help="checkpoint in the native format")
    parser.add_argument("--chat", type=Path, help="the same weights in the original format")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to compare")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = INTERNVL3[arguments.size]
    hf = arguments.hf or _made(arguments.work / "hf", "hf", shape)
    chat = arguments.chat or _made(arguments.work / "chat", "chat", shape)
    prompts = {name: prompt(shape, tiles) for name, tiles in PROMPTS.items()}
    result = compare(hf, chat, prompts, arguments.tokens, arguments.threads)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _made(folder: Path, format: str, shape: Shape) -> Path:
    if not (folder / "model.safetensors").exists():
        print(f"making {folder}")
        make_checkpoint(folder, format=format, shape=shape, dtype=torch.bfloat16)
    return folder


def compare(
    hf: Path,
    chat: Path,
    prompts: dict[str, tuple[list[int], Tensor | None]],
    tokens: int,
    threads: int,
) -> dict[str, Any]:
    """Run one model at a time, so that memory holds one."""
    started = time.monotonic()
    theirs: dict[str, dict[str, Tensor]] = {}
    greedy = {}
    for dtype in (torch.float32, torch.bfloat16):
        reference = Reference(hf, dtype)
        theirs[str(dtype)] = {name: reference.logits(*case) for name, case in prompts.items()}
        if dtype == torch.float32:
            greedy = {name: reference.greedy(*case, tokens) for name, case in prompts.items()}
        del reference
        gc.collect()
    exact = theirs["torch.float32"]
    result: dict[str, Any] = {"torch": torch.__version__, "prompts": {}}
    for name, (ids, _) in prompts.items():
        std = round(float(exact[name].std()), 3)
        result["prompts"][name] = {"prompt tokens": len(ids), "logits std": std}
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        ours, other = (_logits(path, dtype, prompts) for path in (hf, chat))
        for name, logits in ours.items():
            entry = result["prompts"][name]
            entry[f"{short}: ours and theirs"] = _difference(logits, theirs[str(dtype)][name])
            entry[f"{short}: formats equal"] = torch.equal(logits, other[name])
            if dtype == torch.bfloat16:
                entry["bf16: ours and exact"] = _difference(logits, exact[name])
                in_bf16 = theirs["torch.bfloat16"][name]
                entry["bf16: theirs and exact"] = _difference(in_bf16, exact[name])
    driver = Driver(hf, dtype="float32", threads=threads, num_kv_blocks=128)
    for name, (ids, tiles) in prompts.items():
        pictures = [] if tiles is None else list(tiles.split(1))
        driver.add(name, ids, pictures)
        (found,) = driver.generate(tokens, name, chunk=300)
        result["prompts"][name]["greedy tokens"] = tokens
        result["prompts"][name]["greedy tokens equal"] = found == greedy[name]
        result["prompts"][name]["distinct tokens"] = len(set(found))
    result["seconds"] = round(time.monotonic() - started)
    return result


def _logits(
    folder: Path, dtype: torch.dtype, prompts: dict[str, tuple[list[int], Tensor | None]]
) -> dict[str, Tensor]:
    model = load(folder, dtype)
    return {name: run(model, *case) for name, case in prompts.items()}


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    error = (ours - theirs).abs()
    same = ours.argmax(-1) == theirs.argmax(-1)
    return {
        "max": float(f"{error.max():.3g}"),
        "mean": float(f"{error.mean():.3g}"),
        "same top token": float(f"{same.float().mean():.4g}"),
    }


if __name__ == "__main__":
    main()
