"""What each part of the way a CPU computes brings, in one run: the ladder.

    python -m benchmarks.ladder --model DIR --out ladder.json

The lowest rung has torch's own products and attention; each rung above has one thing more. All
rungs are climbed in every round, by the engine alone, so a disturbed round shows. What settings of
the server do not switch off is replaced here, in this process. ``benchmarks.charts`` shows the
result.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compare import facts
from benchmarks.latency import Traffic, request
from benchmarks.latency import measure as serve
from benchmarks.loop import Clock, front_end
from benchmarks.loop import measure as generate
from benchmarks.table import OURS, aligned, ladder
from engine.core import EngineCore
from engine.runner import ModelRunner
from model.attention.sdpa import SdpaAttention
from model.native import BEST, LIBRARY, NARROW
from model.ops import NativeOps, Ops
from wire.channel import Channel
from wire.messages import Flush, ToEngine
from wire.settings import EngineSettings

LEVELS = {"avx2": 2, "avx512": 3, "amx": 4}
"""Rungs that differ by the instructions of the products: ``internvl_choose`` (model/native)."""
RUNGS = {
    "torch": "torch's products and attention",
    "avx2": "products and norms in C, with AVX2",
    "avx512": "the same with AVX512-BF16",
    "amx": "the same with AMX",
    "attention": "attention of the decoder in C",
    "tiles": "attention of the encoder in C",
    "layers": "all layers of the decoder in one call",
    "single": "a step of single tokens in one call",
    "narrow": "the decoder's weights in twelve bits",
    "sketch": "greedy draws by a sketch of the head",
    "wanted": "the last layer for the tokens that need it",
    "pictures": "encoded pictures are kept",
    "prefixes": "blocks of the same beginning are kept",
    "budget": "steps of 200 ms at most beside a stream",
}
TEXT = 28  # tokens beside a picture
STEPS = 12


def rungs() -> dict[str, str]:
    """Those that this processor can stand on, the lowest first, and what each has."""
    best = LIBRARY.internvl_choose(BEST)
    missing = {name for name, level in LEVELS.items() if level > best}
    return {
        name: title
        for name, title in RUNGS.items()
        if name not in missing and (NARROW or name not in ("narrow", "sketch"))
    }


class Ladder:
    """A checkpoint, loaded once for each form that its weights take: as torch wants them, in
    panels, and in panels of twelve bits."""

    def __init__(self, model: Path) -> None:
        self.names = list(rungs())
        self.settings = EngineSettings(
            model=str(model), device="cpu", dtype="bfloat16", max_num_seqs=16, max_model_len=1024,
            num_kv_blocks=128,
        )  # fmt: skip
        self._torch = self._load(Ops())
        self._threads = torch.get_num_threads()
        self._panels = self._load(NativeOps(narrow=False))
        self._best = self._load(NativeOps()) if NARROW else self._panels

    def _load(self, ops: Ops) -> ModelRunner:
        attention = "native" if isinstance(ops, NativeOps) else "sdpa"
        with mock.patch("model.choose", return_value=ops):
            return ModelRunner(dataclasses.replace(self.settings, attention_backend=attention))

    def _on(self, rung: str) -> set[str]:
        return set(self.names[: self.names.index(rung) + 1])

    def runner(self, rung: str) -> ModelRunner:
        """That of the form of weights which a rung has."""
        on = self._on(rung)
        if not on & LEVELS.keys():
            return self._torch
        return self._best if "narrow" in on else self._panels

    @contextlib.contextmanager
    def standing(self, rung: str) -> Iterator[tuple[EngineCore, ModelRunner]]:
        """An engine that has what this rung and those below it have, and its runner."""
        on = self._on(rung)
        in_c = on & LEVELS.keys()
        runner = self.runner(rung)
        # As where the server runs: what torch still does beside the C is done by one thread.
        torch.set_num_threads(1 if in_c else self._threads)
        LIBRARY.internvl_choose(max((LEVELS[name] for name in in_c), default=BEST))
        model, ops = runner._model, runner._model.ops
        replaced: list[tuple[str, object, str, object]] = [
            ("attention", runner, "_attention", SdpaAttention(model.text)),
            ("tiles", ops, "vision_attention", functools.partial(Ops.vision_attention, ops)),
            ("layers", runner._attention, "through", lambda *_: None),
            ("single", runner, "_single", None),
            ("wanted", model, "forward", functools.partial(_of_all, model.forward)),
        ]
        settings = dataclasses.replace(
            self.settings,
            enable_prefix_caching="prefixes" in on,
            step_budget_ms=-1 if "budget" in on else 0,
        )
        with contextlib.ExitStack() as stack:
            for name, owner, attribute, value in replaced:
                if name not in on:
                    stack.enter_context(mock.patch.object(owner, attribute, value))
            if isinstance(ops, NativeOps) and "sketch" not in on:
                head = ops.matrix(model.decoder.output)
                assert head is not None
                stack.callback(setattr, head, "sketch", head.sketch)
                head.sketch = None
            yield EngineCore(settings, runner, runner.ready()), runner


def _of_all(forward: Callable[..., Tensor], *given: Any) -> Tensor:
    """A forward pass that computes the last hidden states of all tokens, and then takes some."""
    *rest, wanted = given
    hidden = forward(*rest, None)
    return hidden if wanted is None else hidden[wanted]


def measure(stand: Ladder, rung: str, label: str, channel: Channel[ToEngine]) -> dict[str, float]:
    """The figures of a rung, milliseconds; names of requests begin with ``label``."""
    with stand.standing(rung) as (core, runner):
        found = {}
        for rows in (1, 16):
            taken = generate(core, channel, Clock(), rows, 64, STEPS)["ms_per_step"]
            found[f"step_{rows}_ms"] = taken["step"]
        side = runner.ready().geometry.tile_size
        with torch.inference_mode():
            began = time.perf_counter()
            runner._model.encode_tiles(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        found["tile_ms"] = 1e3 * (time.perf_counter() - began)
        found["picture_ms"] = first_token(core, f"{label} picture")
        if stand.names.index(rung) < stand.names.index("pictures"):
            core.take(Flush(), [])
        found["again_ms"] = first_token(core, f"{label} again", f"{label} picture")
        if stand.names.index(rung) >= stand.names.index("prefixes"):
            traffic = Traffic(label, 1, pictures=4, tiles=1, text=TEXT, answer=1, every=0.0)
            found["pause_ms"] = serve(core, traffic)["between_tokens"]["max"]
    return found


def first_token(core: EngineCore, name: str, picture: str = "") -> float:
    """Milliseconds from a request with a picture to its first token."""
    began = time.perf_counter()
    request(core, name, TEXT, 1, 1, picture)
    found = []
    while (report := core.step()) is not None:
        found += [time.perf_counter() - began for output in report.outputs if output.token_ids]
    (seconds,) = found
    return 1e3 * seconds


def main() -> None:
    """Read the command line, write the result, print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    records: list[dict[str, Any]] = []
    found = facts("the engine alone") | {"cases": rungs(), "records": records}
    stand = Ladder(given.model)
    with front_end() as channel:
        for number in range(given.rounds):
            for rung in stand.names:
                figures = measure(stand, rung, f"{number} {rung}", channel)
                rounded = {name: round(value, 2) for name, value in figures.items()}
                records.append({"server": OURS, "case": rung, "round": number} | rounded)
                print(json.dumps(records[-1]), file=sys.stderr, flush=True)
                given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(aligned(ladder(found)))


if __name__ == "__main__":
    main()
