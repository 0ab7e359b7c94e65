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

from engine.sampling import FILTERS, SHAPING
from engine.sampling.base import SampleRow, Step, chunk_sums, weights
from model.transfer import to_device

_BITS = 48
_BELOW_ONE = 1 - 2.0**-_BITS
NOT_FINITE, NOTHING_LEFT = -1, -2
"""What ``sample`` gives in place of a token."""
# Logits that go through the steps at once, which make several times as much of them.
_AT_ONCE = 1 << 22


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-48, fixed by its arguments."""
    data = struct.pack("<qQ", seed, position)
    digest = hashlib.blake2b(data, digest_size=8, person=b"internvl-draw").digest()
    return (int.from_bytes(digest, "little") >> (64 - _BITS)) * 2.0**-_BITS


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The next token of each row of fp32 logits ``[R, V]``: int64 ``[R]``, on their device.

    NOT_FINITE where the logits are not numbers, NOTHING_LEFT where all that might be drawn was
    removed. Nothing here waits for the device.
    """
    count = max(1, _AT_ONCE // logits.shape[-1])
    if len(rows) <= count:
        return _sample(logits, rows)
    parts = [
        _sample(logits[i : i + count], rows[i : i + count]) for i in range(0, len(rows), count)
    ]
    return torch.cat(parts)


def _sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    logits = _apply(SHAPING, logits, rows)
    best, tokens = logits.max(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = [rows[i] for i in drawn]
        numbers = [uniform(row.params.seed, row.position) for row in chosen]
        if len(drawn) == len(rows):
            tokens = _draw(_apply(FILTERS, logits, chosen), numbers)
        else:
            index = to_device(drawn, logits.device)
            found = _draw(_apply(FILTERS, logits[index], chosen), numbers)
            tokens = tokens.index_copy(0, index, found)
    # NaN and +inf come through a maximum; -inf alone means that a token was removed.
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


def _draw(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """The first token whose cumulated probability exceeds the row's number.

    Found in two strides: the chunk, then the token in it.
    """
    chunks, sums = chunk_sums(weights(logits))
    number = to_device(numbers, logits.device, torch.float64)[:, None]
    chunk, rest = _find(sums, number * sums[:, -1:])
    chosen = chunks[torch.arange(len(chunks), device=logits.device), chunk[:, 0]]
    token, _ = _find(chosen.cumsum(-1, dtype=torch.float64), rest)
    return (chunk * chunks.shape[-1] + token)[:, 0]


def _find(sums: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the sums [R, K] that exceeds ``wanted`` [R, 1], and by how much that exceeds
    the sum before."""
    # Below the last sum something is found, and it is possible: an impossible token's sum equals
    # the one before.
    wanted = wanted.minimum(sums[:, -1:] * _BELOW_ONE)
    found = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[-1] - 1)
    before = sums.gather(-1, (found - 1).clamp(min=0)).where(found > 0, 0.0)
    return found, wanted - before
