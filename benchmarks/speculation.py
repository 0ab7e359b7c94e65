"""What tokens on trial bring, by what is written: steps of a true model, its tokens dictated.

    python -m benchmarks.speculation --model DIR --out speculation.json

A checkpoint with random weights repeats nothing, and a demo says little: so the engine computes
everything as it would, but each token that it draws is replaced by the next one of a text, as if
that were what it writes. Texts are files of this repository, of four kinds; a list of random tokens
in which nothing repeats says what it costs where it brings nothing, and the same with itself as
``prediction`` what it brings at most. With and without take turns.
"""

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.compare import facts
from benchmarks.table import aligned
from engine.core import EngineCore
from engine.runner import ModelRunner
from server.tokenizer import Tokenizer
from wire.messages import EngineRequest, pack
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

ROOT = Path(__file__).parents[1]
FILES = {
    "prose": "docs/security.md",
    "tables": "docs/api-reference.md",
    "JSON": "helm/values.schema.json",
    "Python": "engine/scheduler.py",
}
PROMPT = 64  # tokens of each text


class Dictated(ModelRunner):
    """Draws what ``texts`` say of a request in place of what the model says, and as late."""

    texts: ClassVar[dict[str, list[int]]] = {}

    def sample(self) -> None:
        begun = self._begun
        assert begun is not None
        if self.texts and begun.names:
            assert len(begun.tokens), "only greedy steps on the CPU in bfloat16 can be dictated"
            begun.tokens = self._dictate(begun.names)
        super().sample()

    def _dictate(self, names: Sequence[str]) -> Tensor:
        rows = self._rows.sample_rows(names)
        texts = [self.texts[name] for name in names]
        return torch.tensor(
            [text[row.position] for text, row in zip(texts, rows, strict=True)], dtype=torch.int64
        )


def texts(model: Path, tokens: int) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Prompt, answer and prediction of each case."""
    tokenizer = Tokenizer.load(model)
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for name, file in FILES.items():
        ids = tokenizer.encode((ROOT / file).read_text())
        start = (len(ids) - PROMPT - tokens) // 2
        found[name] = ids[start:][:PROMPT], ids[start + PROMPT :][:tokens], []
    ids = random.Random(0).sample(range(1000, 90_000), PROMPT + tokens)
    found["nothing repeats"] = ids[:PROMPT], ids[PROMPT:], []
    found["all is predicted"] = ids[:PROMPT], ids[PROMPT:], ids[PROMPT:]
    return found


@dataclasses.dataclass
class Times:
    """Seconds from the first token to the last, of each round."""

    without: list[float] = dataclasses.field(default_factory=list)
    with_trial: list[float] = dataclasses.field(default_factory=list)

    def figures(self, tokens: int) -> dict[str, Any]:
        """Tokens per second, and how many times as fast: median, least and greatest."""
        ratios = [a / b for a, b in zip(self.without, self.with_trial, strict=True)]
        return {
            "tokens_per_s": [
                round(tokens / statistics.median(each), 1)
                for each in (self.without, self.with_trial)
            ],
            "times_as_fast": [
                round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))
            ],
        }


def write(core: EngineCore, requests: Sequence[EngineRequest]) -> float:
    """Seconds from the first token to the last."""
    for request in requests:
        core.add(request)
    began = None
    while core.has_work:
        report = core.step()
        if began is None and report is not None and report.outputs:
            began = time.perf_counter()
    assert began is not None
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, write the result, print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=400, help="that are written of each text")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 3], help="at once")
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args(argv)
    settings = EngineSettings(
        model=str(arguments.model),
        max_model_len=2048,
        enable_prefix_caching=False,
        quantization=arguments.quantization,
    )
    runner = Dictated(settings)
    plain = dataclasses.replace(settings, speculative_tokens=0)
    without, with_trial = (EngineCore(each, runner, runner.ready()) for each in (plain, settings))
    sampling = SamplingParams(max_tokens=arguments.tokens, temperature=0.0)
    cases = []
    for name, (prompt, answer, prediction) in texts(arguments.model, arguments.tokens).items():
        for count in arguments.sequences:
            requests = [
                EngineRequest(f"{name} {number}", prompt, sampling, prediction=pack(prediction))
                for number in range(count)
            ]
            Dictated.texts = {request.id: answer for request in requests}
            times, before = Times(), with_trial._scheduler.stats
            turns = [(without, times.without), (with_trial, times.with_trial)]
            for _ in range(arguments.rounds):
                for core, spent in turns:
                    spent.append(write(core, requests))
                turns.reverse()
            stats = with_trial._scheduler.stats
            tried = stats.speculated_tokens - before.speculated_tokens
            right = stats.accepted_tokens - before.accepted_tokens
            written = len(answer) * count
            cases.append(
                {"text": name, "sequences": count}
                | times.figures(written)
                | {
                    "tried_per_100": round(100 * tried / arguments.rounds / written, 1),
                    "right_per_100": round(100 * right / arguments.rounds / written, 1),
                }
            )
            print(json.dumps(cases[-1]), flush=True)
    result = facts("the engine alone") | {"cases": cases}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(aligned(table(cases)))


def table(cases: Sequence[dict[str, Any]]) -> str:
    """As docs/performance.md has it."""
    lines = ["| text | at once | tokens/s without | with | times as fast | tried / right of 100 |"]
    lines.append("|---|---|---|---|---|---|")
    for case in cases:
        without, with_trial = case["tokens_per_s"]
        middle, least, most = case["times_as_fast"]
        lines.append(
            f"| {case['text']} | {case['sequences']} | {without} | {with_trial} | "
            f"{middle} ({least}–{most}) | {case['tried_per_100']} / {case['right_per_100']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
