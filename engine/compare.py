"""transformers' side of ``internvl verify``, and the comparison.

    python -m engine.compare SETTINGS_AS_JSON CHECKPOINT FOLDER

Reads ``wire.cases.CASES`` and ``OURS`` in the folder and leaves ``FOUND`` there.

A difference has bounds that follow from what may cause it. In float32 both sides add the same
numbers in another order. In a coarser precision both are off by its rounding: ours may be no
further from transformers' float32 than transformers' own is in that precision, but for chance.
"""

import gc
import math
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.official import Grid, Official
from engine.reference import NoReference, Reference
from wire.cases import CASES, FOUND, OURS, TOKENS, Case, Cases, Found, Logits, Outcome, positions
from wire.settings import EngineSettings

# Of the logits' deviation. The largest seen is 5e-5, of the 1B in full shape; another epsilon,
# activation or order of anything makes 1e-2 and more.
EXACT = 3e-4
# How much further than transformers' from what is exact. The same rounding at other places: seen
# are factors from 0.9 to 1.1 of the root mean square.
CHANCE = 1.5
Given = tuple[list[int], Tensor | None]
Generated = tuple[list[int], Tensor]


class Seen:
    """A case as transformers sees it: tiles, grids and ids."""

    def __init__(self, case: Case, official: Official, tile_size: int) -> None:
        shown = [official.tiles(picture, frame=False) for picture in case.pictures]
        shown += [official.tiles(picture, frame=True) for picture in case.frames]
        self.tiles = [tiles for tiles, _ in shown]
        self.grids: list[Grid] = [grid for _, grid in shown]
        self.ids = official.prompt(case, [len(tiles) for tiles in self.tiles])
        self.pixels = official.pixels(torch.cat(self.tiles)) if self.tiles else None
        raw = b"".join(case.buffers[item.buffer] for item in case.request.items)
        side = tile_size
        self.ours = torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)
        self.ours = self.ours[: len(raw)].view(-1, 3, side, side)

    def difference(self) -> int | None:
        """The largest of a sample; None where there are not as many, or not as large tiles."""
        if not self.tiles:
            return 0 if not len(self.ours) else None
        theirs = torch.cat(self.tiles)
        if theirs.shape != self.ours.shape:
            return None
        return int((theirs.int() - self.ours.int()).abs().max())

    def sides(self) -> tuple[int, int]:
        """Of our tiles and theirs."""
        return self.ours.shape[-1], self.tiles[0].shape[-1]


def compare(settings: EngineSettings, folder: Path, work: Path) -> Found:
    """Everything that can be compared. Raises NoReference."""
    given = msgspec.msgpack.decode((work / CASES).read_bytes(), type=Cases)
    ready, ours = given.ready, load_file(work / OURS)
    official = Official(folder, settings.max_tiles)
    seen = {case.name: Seen(case, official, ready.geometry.tile_size) for case in given.cases}
    prompts: dict[str, Given] = {
        case.name: (seen[case.name].ids, seen[case.name].pixels)
        for case in given.cases
        if case.computed and seen[case.name].ids == case.request.prompt
    }
    # Weights in four bits are compared with those that they stand for.
    quantization = "none" if settings.quantization == "awq" else settings.quantization
    rounded = ready.dtype != "float32" or quantization != "none"
    exact: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    greedy: dict[str, Generated] = {}
    if prompts:
        device = "cuda" if ready.device.startswith("cuda") else "cpu"
        options: dict[str, Any] = {"device": device, "image_token": official.image_token}
        if rounded:
            exact = _logits(Reference(folder, **options), prompts, "float32")
            gc.collect()
        dtype = getattr(torch, ready.dtype)
        reference = Reference(folder, dtype, quantization=quantization, **options)
        theirs = _logits(reference, prompts, ready.dtype)
        count = max(case.request.sampling.max_tokens for case in given.cases)
        for name, prompt in prompts.items():
            greedy[name] = reference.generate(*prompt, count, ready.eos_token_ids)

    def outcome(case: Case) -> Outcome:
        name, logits = case.name, None
        if name in theirs:
            logits = _difference(ours[name], theirs[name], exact.get(name))
        tokens = ours[name + TOKENS].tolist() if case.computed else []
        return _judge(case, seen[name], logits, tokens, greedy.get(name))

    outcomes = [outcome(case) for case in given.cases]
    return Found(outcomes, ready.dtype, settings.quantization, official.notes, _bounds(rounded))


def _logits(reference: Reference, prompts: dict[str, Given], kind: str) -> dict[str, Tensor]:
    found = {}
    for name, (ids, pixels) in prompts.items():
        print(f"theirs, {kind}: {name}", file=sys.stderr, flush=True)
        found[name] = reference.logits(ids, pixels, positions(len(ids)))
    return found


def _difference(ours: Tensor, theirs: Tensor, exact: Tensor | None) -> Logits:
    error, deviation = float((ours - theirs).abs().max()), float(theirs.std())
    relative = error / deviation if deviation else error and math.inf
    same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    if exact is None:
        return Logits(error, relative, deviation, same)
    true, found = exact.double().log_softmax(-1), ours.double().log_softmax(-1)
    return Logits(
        error,
        relative,
        deviation,
        same,
        ours_exact=float((ours - exact).square().mean().sqrt()),
        theirs_exact=float((theirs - exact).square().mean().sqrt()),
        divergence=float((true.exp() * (true - found)).sum(-1).mean()),
        agreement=float((ours.argmax(-1) == exact.argmax(-1)).double().mean()),
    )


def _judge(
    case: Case, seen: Seen, logits: Logits | None, ours: list[int], theirs: Generated | None
) -> Outcome:
    wrong = []
    tiles = len(seen.ours), sum(map(len, seen.tiles))
    pictures = seen.grids[: len(case.pictures)]
    if tiles[0] != tiles[1]:
        wrong.append(f"tiles: {tiles[0]} instead of {tiles[1]}")
    if case.grids != pictures:
        wrong.append(f"grids: {_grids(case.grids)} instead of {_grids(pictures)}")
    pixels = seen.difference()
    if pixels is None and tiles[0] == tiles[1]:
        wrong.append("pixels: tiles are {} wide instead of {}".format(*seen.sides()))
    if pixels:
        wrong.append(f"pixels: differ by up to {pixels} of 255")
    prompt = case.request.prompt
    at = _first_difference(prompt, seen.ids)
    if at is not None:
        wrong.append(f"prompt: differs from token {at} on ({len(prompt)} and {len(seen.ids)})")
        if case.computed:
            wrong.append("logits: not compared, for the prompts are not the same")
    if logits is not None:
        wrong += _of_logits(logits)
    equal, margin = len(ours), None
    if theirs is not None and logits is not None:
        found = _first_difference(ours, theirs[0])
        if found is not None:
            equal = found
            margin = _margin(theirs, ours, found)
            wrong += _of_token(found, margin, logits)
    return Outcome(
        name=case.name,
        tiles=tiles,
        grids=(case.grids, pictures),
        pixels=pixels,
        prompt=(len(prompt), len(seen.ids)),
        prompt_differs=at,
        logits=logits,
        greedy=equal,
        tokens=len(ours),
        margin=margin,
        wrong=wrong,
    )


def _of_logits(logits: Logits) -> list[str]:
    if logits.theirs_exact == 0:
        if logits.relative <= EXACT:
            return []
        return [f"logits: differ by {logits.relative:.2g} of their deviation, {EXACT:g} may be"]
    if logits.ours_exact <= CHANCE * logits.theirs_exact:
        return []
    return [
        f"logits: off by {logits.ours_exact:.2g} from float32, transformers' by "
        f"{logits.theirs_exact:.2g}; {CHANCE:g} times as much may be"
    ]


def _of_token(at: int, margin: float, logits: Logits) -> list[str]:
    # Both logits may be off by as much.
    most = 2 * max(logits.largest, EXACT * logits.deviation)
    if margin <= most:  # which what is not a number is not
        return []
    return [f"greedy: token {at} is another, by {margin:.2g} where {most:.2g} may be"]


def _margin(theirs: Generated, ours: list[int], at: int) -> float:
    """By how much transformers finds its own token likelier than ours."""
    tokens, logits = theirs
    if at >= min(len(ours), len(tokens)):
        return float("inf")  # one ends where the other goes on
    return float(logits[at, tokens[at]] - logits[at, ours[at]])


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    unlike = (at for at, (one, other) in enumerate(pairs) if one != other)
    return next(unlike, min(len(ours), len(theirs)))


def _grids(grids: list[Grid]) -> str:
    return ", ".join(f"{columns}x{rows}" for columns, rows in grids) or "none"


def _bounds(rounded: bool) -> str:
    if not rounded:
        return (
            f"logits within {EXACT:g} of their deviation: both sides add the same numbers, in "
            "another order"
        )
    return (
        f"logits no further from transformers' in float32 than {CHANCE:g} times as far as "
        "transformers' in the same precision are: both are off by its rounding, at other places"
    )


def main() -> int:
    """0, or 2 if transformers cannot compute this."""
    settings = msgspec.json.decode(sys.argv[1], type=EngineSettings)
    folder, work = Path(sys.argv[2]), Path(sys.argv[3])
    torch.backends.cudnn.allow_tf32 = False
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        found = compare(settings, folder, work)
    except (NoReference, torch.OutOfMemoryError) as error:
        print(f"transformers cannot compute this: {error}", file=sys.stderr)
        return 2
    (work / FOUND).write_bytes(msgspec.msgpack.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
