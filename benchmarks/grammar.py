"""What a grammar costs per token on the host: taking in the last token and making the next mask.

Follows a text of each grammar token by token with one row, and with 64 rows at once that stand at
different places of it, as in a batch; then compiles each grammar anew. Prints JSON: microseconds at
the median and the 99th percentile. ``--tokenizer`` is a folder with tokenizer.json, or with
vocab.json and merges.txt of a byte-level BPE in Qwen2's form; the demo model's without it.

    python -m benchmarks.grammar --tokenizer DIR
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from demo import CHECKPOINT
from engine.grammar import Grammars, Matcher, masks
from wire.sampling import Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "date": {"type": "string", "format": "date"},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "kind": {"enum": ["book", "tool", "toy"]},
                    "price": {"type": "number", "minimum": 0},
                    "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4},
                },
                "required": ["name", "kind", "price"],
                "additionalProperties": False,
            },
        },
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["title", "items"],
    "additionalProperties": False,
}
ANSWER = json.dumps(
    {
        "title": "What lies on the table",
        "date": "2026-11-21",
        "items": [
            {"name": "A red hammer", "kind": "tool", "price": 12.5, "box": [10, 20, 300, 400]},
            {"name": "A book about birds of the north", "kind": "book", "price": 8},
        ],
        "note": "One more thing is hidden behind the lamp.",
    }
)
CASES = {
    "json_object": (Grammar("json_object"), ANSWER),
    "json_schema": (Grammar("json_schema", json.dumps(SCHEMA)), ANSWER),
    "regex": (
        Grammar("regex", r"[A-Z][a-z ]{1,40}: (\+\d{1,3} )?\d{3}-\d{4}( or [^@\s]+@[a-z.]+)?"),
        "Call the office at: +49 555-1234 or office@example.org",
    ),
    "choice": (
        Grammar("choice", json.dumps([f"a {a} {b}" for a in ("red", "blue") for b in "xyzuvw"])),
        "a blue w",
    ),
}
END = "<|im_end|>"


def load(folder: Path) -> str:
    """The text of a tokenizer.json."""
    file = folder / "tokenizer.json"
    if file.exists():
        return file.read_text(encoding="utf-8")
    made = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return str(made.to_str())


def rows(made: Grammars, grammar: Grammar, count: int) -> list[Matcher]:
    """Matchers at the beginning."""
    params = SamplingParams(stop_token_ids=(0,), grammar=grammar)
    matchers = [made.matcher(params) for _ in range(count)]
    return [matcher for matcher in matchers if matcher is not None]


def steps(
    make: Callable[[], list[Matcher]], ids: np.ndarray, times: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step of walks through ``ids``, all rows together, and of each first step."""
    warm: list[float] = []
    first: list[float] = []
    for _ in range(times):
        matchers = make()
        starts = [len(ids) * i // len(matchers) for i in range(len(matchers))]
        for matcher, start in zip(matchers, starts, strict=True):
            matcher.advance(ids[:start])
        for step in range(len(ids)):
            begin = time.perf_counter()
            for matcher, start in zip(matchers, starts, strict=True):
                if start + step <= len(ids):
                    matcher.advance(ids[: start + step])
            masks(matchers)
            (warm if step else first).append(time.perf_counter() - begin)
        assert not any(matcher.error for matcher in matchers)
    return warm, first


def micro(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * 1e6, 1), "p99": round(cuts[98] * 1e6, 1)}


def main() -> None:
    """Read the arguments, print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT)
    parser.add_argument("--times", type=int, default=40)
    arguments = parser.parse_args()
    text = load(arguments.tokenizer)
    encode = Tokenizer.from_str(text).encode
    begin = time.perf_counter()
    tokenizer = LLTokenizer(text)
    found: dict[str, object] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "vocabulary": tokenizer.vocab_size,
        "ms_to_load": round((time.perf_counter() - begin) * 1e3, 1),
    }
    for name, (grammar, answer) in CASES.items():
        ids = np.array(encode(answer, add_special_tokens=False).ids)
        compiling = []
        for _ in range(arguments.times):
            made = Grammars(tokenizer)
            begin = time.perf_counter()
            rows(made, grammar, 1)
            compiling.append(time.perf_counter() - begin)

        def make(count: int, made: Grammars = made, grammar: Grammar = grammar) -> list[Matcher]:
            return rows(made, grammar, count)

        one, first = steps(lambda make=make: make(1), ids, arguments.times)  # type: ignore[misc]
        many, _ = steps(lambda make=make: make(64), ids, max(1, arguments.times // 20))  # type: ignore[misc]
        found[name] = {
            "tokens": len(ids),
            "us_to_compile": micro(compiling),
            "us_first_mask": micro(first),
            "us_per_token": micro(one),
            "us_per_step_of_64_rows": micro(many),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
