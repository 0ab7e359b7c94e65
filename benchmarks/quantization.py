"""Whether a quantised model still answers as the model does: the gate that it has to pass.

    python -m benchmarks.quantization CHECKPOINT --quantization fp8 --device cuda --out result.json

Over pictures and questions about them, greedy answers are written with the weights as they are, and
both models read them: the divergence of their distributions (Kullback-Leibler, in nats, the mean
over the answers' tokens), how often they agree on the likeliest token, and how many answers are
written alike from the start to the end. Ends with 1 where the first two miss their marks, which are
ours.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.pictures import Scene, place, render
from model import InternVL, build_model, load_config
from preprocessing.media import TileSettings
from preprocessing.tiling import tile
from tests.parity.direct import run

MOST_DIVERGENCE = 0.02
LEAST_AGREEMENT = 0.95
QUESTIONS = (
    "What is in this picture?",
    "How many things are there?",
    "Which colours do you see?",
    "Describe the picture in one sentence.",
)
SIZES = ((100, 100), (640, 480), (300, 900))

Case = tuple[list[int], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write the result, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", default="fp8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args(arguments)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    config = load_config(given.checkpoint)
    exact, other = (
        build_model(config, given.checkpoint, device=device, dtype=dtype, quantization=kind)
        for kind in ("none", given.quantization)
    )
    tokenizer = Tokenizer.from_file(str(given.checkpoint / "tokenizer.json"))
    with device:
        found = compare(exact, other, cases(exact, tokenizer), tokenizer, given.tokens)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(not found["passed"])


def cases(model: InternVL, tokenizer: Tokenizer) -> list[Case]:
    """Ids and tiles: every question about every picture, in the checkpoint's own format."""
    geometry, found = model.config.geometry, []
    rng = np.random.default_rng(0)
    for size in SIZES:
        scene = Scene(*size, (255, 255, 255))
        place(rng, scene, 3)
        cut, count, _, _ = tile(render(scene, rng), TileSettings.of(geometry))
        side = geometry.tile_size
        tiles = torch.frombuffer(bytearray(cut), dtype=torch.uint8).view(count, 3, side, side)
        context = "<IMG_CONTEXT>" * (count * geometry.tokens_per_tile)
        for question in QUESTIONS:
            text = f"<|im_start|>user\n<img>{context}</img>\n{question}<|im_end|>\n"
            ids = tokenizer.encode(text + "<|im_start|>assistant\n").ids
            found.append((ids, tiles.to(model.device)))
    return found


def compare(
    exact: InternVL, other: InternVL, asked: list[Case], tokenizer: Tokenizer, tokens: int
) -> dict[str, Any]:
    """The figures of the gate."""
    context = tokenizer.token_to_id("<IMG_CONTEXT>")
    divergence, agreed, alike = [], [], 0
    for ids, tiles in asked:
        answers = [_answer(model, ids, tiles, context, tokens) for model in (exact, other)]
        alike += answers[0] == answers[1]
        written = slice(len(ids) - 1, -1)
        logits = (run(one, ids + answers[0], tiles, context)[written] for one in (exact, other))
        true, found = (part.double().log_softmax(-1) for part in logits)
        divergence.append((true.exp() * (true - found)).sum(-1))
        agreed.append(true.argmax(-1) == found.argmax(-1))
    mean, share = (float(torch.cat(part).double().mean()) for part in (divergence, agreed))
    return {
        "divergence": mean,
        "most_divergence": MOST_DIVERGENCE,
        "agreement": share,
        "least_agreement": LEAST_AGREEMENT,
        "answers": len(asked),
        "answers_alike": alike,
        "passed": mean <= MOST_DIVERGENCE and share >= LEAST_AGREEMENT,
    }


def _answer(model: InternVL, ids: list[int], tiles: Tensor, context: int, tokens: int) -> list[int]:
    """Greedy, every token from the whole prompt: slow, and nothing to get wrong."""
    answer: list[int] = []
    while len(answer) < tokens:
        answer.append(int(run(model, ids + answer, tiles, context)[-1].argmax()))
        if answer[-1] in model.config.eos_token_ids:
            break
    return answer


if __name__ == "__main__":
    raise SystemExit(main())
