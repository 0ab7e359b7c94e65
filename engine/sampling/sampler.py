"""Draws one token per row.

A draw depends on the row's logits, its seed and its output position, and on nothing else.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.sampling import FILTERS, SHAPING
from engine.sampling.base import NOT_FINITE, NOTHING_LEFT, SampleRow, Step
from engine.sampling.filters import COLDEST
from engine.sampling.noise import exponentials, key
from model import triton as kernels
from model.transfer import to_device

# Logits that go through the steps at once, which make several times as much of them. On the CPU as
# many as stay in its caches.
_AT_ONCE = 1 << 22
_AT_ONCE_CPU = 1 << 18


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The next token of each row of fp32 logits ``[R, V]``: int64 ``[R]``, on their device.

    NOT_FINITE where the logits are not numbers, NOTHING_LEFT where all that might be drawn was
    removed. Nothing here waits for the device.
    """
    count = _at_once(logits)
    if not any(step.needed(row) for step in SHAPING for row in rows) and (
        _is_fused(logits) or all(row.params.greedy for row in rows)
    ):
        count = len(rows)  # nothing is made but tokens
    if len(rows) <= count:
        return _sample(logits, rows)
    parts = [
        _sample(logits[i : i + count], rows[i : i + count]) for i in range(0, len(rows), count)
    ]
    return torch.cat(parts)


def sample_plain(logits: Tensor, draws: Tensor | None = None) -> Tensor:
    """The same tokens for rows that are plain (``engine.sampling.is_plain``), without the host.

    ``draws`` [3, R] int32 holds two numbers of each row's key and the bits of its temperature as
    fp32, 0 where it is greedy; without them all are.
    """
    if _is_fused(logits):
        from engine.sampling import fused

        return fused.draw(logits, fused.plain_wishes(draws, logits))
    if draws is None:
        best, tokens = highest(logits)
        return _checked(tokens, best)
    count = _at_once(logits)
    parts = zip(logits.split(count), draws.split(count, dim=1), strict=True)
    return torch.cat([_plain(*part) for part in parts])


def draws(rows: Sequence[SampleRow], size: int) -> np.ndarray | None:
    """What ``sample_plain`` wants, of plain rows and as many greedy ones as make ``size``."""
    found = np.zeros((3, size), dtype=np.int32)
    heats = found[2].view(np.float32)
    for index, row in enumerate(rows):
        if not row.params.greedy:
            found[:2, index] = key(row.params.seed, row.position)
            heats[index] = max(row.params.temperature, COLDEST)
    return found if heats.any() else None


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row of fp32 logits ``[R, V]``, and its place: the first of those that are
    as high, or the first NaN."""
    if logits.device.type != "cpu":
        best, places = logits.max(dim=-1)
        return best, places
    # Much faster than torch's maximum with its place.
    places = torch.from_numpy(logits.numpy().argmax(-1))
    return logits.gather(-1, places[:, None])[:, 0], places


def sound(names: Sequence[str], tokens: Sequence[int]) -> Sequence[int]:
    """What was drawn, by row; NOT_FINITE for all of a row that has it behind any of its tokens on
    trial, be that a wrong one: what is not a number stays in the cache behind the row's end, and
    who copies the block would have it."""
    if NOT_FINITE not in tokens:
        return tokens
    sick = {name for name, token in zip(names, tokens, strict=True) if token == NOT_FINITE}
    return [
        NOT_FINITE if name in sick else token for name, token in zip(names, tokens, strict=True)
    ]


def _is_fused(logits: Tensor) -> bool:
    """Whether one kernel draws. Triton is imported then, which takes a while and is not
    everywhere."""
    return logits.is_cuda and kernels.missing(logits.device) is None


def _at_once(logits: Tensor) -> int:
    """Rows that go through the steps together."""
    most = _AT_ONCE_CPU if logits.device.type == "cpu" else _AT_ONCE
    return max(1, most // logits.shape[-1])


def _plain(logits: Tensor, draws: Tensor) -> Tensor:
    best, tokens = highest(logits)
    heats = draws[2].view(torch.float32)[:, None]
    # As the step does it, to the bit; a greedy row's quotient is not used.
    cooled = torch.where(heats == 1.0, logits, (logits - best[:, None]) / heats)
    drawn = _race(cooled, draws[:2].T)
    return _checked(torch.where(heats[:, 0] > 0, drawn, tokens), best)


def _sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    logits = _apply(SHAPING, logits, rows)
    if _is_fused(logits):
        from engine.sampling import fused

        return fused.draw(logits, to_device(fused.wishes(rows), logits.device))
    best, tokens = highest(logits)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = [rows[i] for i in drawn]
        keys = [key(row.params.seed, row.position) for row in chosen]
        if len(drawn) == len(rows):
            tokens = _draw(_apply(FILTERS, logits, chosen), keys)
        else:
            index = to_device(drawn, logits.device)
            found = _draw(_apply(FILTERS, logits[index], chosen), keys)
            tokens = tokens.index_copy(0, index, found)
    return _checked(tokens, best)


def _checked(tokens: Tensor, best: Tensor) -> Tensor:
    # NaN and +inf come through a maximum; -inf alone means that a token was removed.
    if best.device.type == "cpu" and all(map(math.isfinite, best.tolist())):
        return tokens
    return tokens.where(best.isfinite(), NOT_FINITE).where(best != -torch.inf, NOTHING_LEFT)


def _apply(steps: Sequence[Step], logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Put the rows that need a step through it."""
    for step in steps:
        chosen = [i for i, row in enumerate(rows) if step.needed(row)]
        if len(chosen) == len(rows):
            logits = step.apply(logits, rows)
        elif chosen:
            index = to_device(chosen, logits.device)
            changed = step.apply(logits[index], [rows[i] for i in chosen])
            logits = logits.index_copy(0, index, changed)
    return logits


def _draw(logits: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
    return _race(logits, to_device(keys, logits.device, torch.int32))


def _race(logits: Tensor, keys: Tensor) -> Tensor:
    """The winner of each row's race; see ``noise``. A removed token never wins."""
    return (logits - exponentials(keys, logits.shape[-1]).log_()).argmax(-1)
