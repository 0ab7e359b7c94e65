"""Draws one token per row.

A draw depends on the row's logits, its seed and its output position, and on nothing else: the
uniform number is a hash of seed and position, and the token is found by inverting the cumulated
probabilities in vocabulary order.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling import STEPS
from wire.sampling import SamplingParams

_BITS = 48


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-48, fixed by its arguments."""
    data = struct.pack("<qQ", seed, position)
    digest = hashlib.blake2b(data, digest_size=8, person=b"internvl-draw").digest()
    return (int.from_bytes(digest, "little") >> (64 - _BITS)) * 2.0**-_BITS


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int | None]:
    """The next token of each row of fp32 logits ``[R, V]``; None where they are not finite.

    ``positions`` are the rows' output positions, the first generated token's being 0.
    """
    least, most = logits.aminmax(dim=-1)
    finite = (least.isfinite() & most.isfinite()).tolist()
    tokens: list[int | None] = [None] * len(params)
    greedy = [row for row, p in enumerate(params) if finite[row] and p.greedy]
    drawn = [row for row, p in enumerate(params) if finite[row] and not p.greedy]
    if greedy:
        for row, token in zip(greedy, _take(logits, greedy).argmax(-1).tolist(), strict=True):
            tokens[row] = token
    if drawn:
        chosen = [params[row] for row in drawn]
        numbers = [uniform(p.seed, positions[row]) for row, p in zip(drawn, chosen, strict=True)]
        found = _draw(_filter(_take(logits, drawn), chosen), numbers)
        for row, token in zip(drawn, found, strict=True):
            tokens[row] = token
    return tokens


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _filter(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    for step in STEPS:
        rows = [row for row, p in enumerate(params) if step.needed(p)]
        if len(rows) == len(params):
            logits = step.apply(logits, params)
        elif rows:
            changed = step.apply(logits[rows], [params[row] for row in rows])
            logits = logits.clone()
            logits[rows] = changed
    return logits


def _draw(logits: Tensor, numbers: Sequence[float]) -> list[int]:
    """The first token whose cumulated probability exceeds the row's number."""
    total = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    # The number is at most 1 - 2**-48, so the product stays below the last sum and an
    # impossible token, whose sum equals the one before, is never found.
    wanted = torch.tensor(numbers, dtype=total.dtype, device=total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, wanted, right=True)[:, 0].tolist()
