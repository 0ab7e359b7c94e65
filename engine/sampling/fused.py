"""The draw on CUDA devices: one kernel from shaped logits to a token, without a sort.

It keeps the tokens that ``filters`` keeps, ties included, and draws with the numbers of ``noise``.
Every filter keeps what reaches some logit. That one is searched for by bisection over the numbers
there are in fp32, counting tokens or summing their probabilities, until no more than one token is
in doubt. A row is one program's, so a draw does not depend on the batch.

Sums are fp32 here and partly fp64 there: a token at which the probabilities come within 1e-5 of p
may be judged differently.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.sampling.base import NOT_FINITE, NOTHING_LEFT, SampleRow
from engine.sampling.filters import COLDEST
from engine.sampling.noise import key

_BLOCK = 2048
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
# Floors tried by one look at a row.
_FLOORS = tl.constexpr(4)


@triton.jit
def _code(value):
    """The place of a float among all floats."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(code):
    """The float at a place."""
    bits = code.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(row_pointer, token, count, top, heat):
    """Logits as ``Temperature`` leaves them, which touches no row whose temperature is 1."""
    logits = tl.load(row_pointer + token, mask=token < count, other=float("-inf"))
    return tl.where(heat == 1.0, logits, tl.div_rn(logits - top, heat))


@triton.jit
def _measure(row_pointer, count, top, heat, floors, BLOCK: tl.constexpr):
    """How many tokens reach each of the floors, and the sum of their probabilities over that of the
    likeliest."""
    peak = tl.where(heat == 1.0, top, 0.0)
    numbers = tl.zeros([_FLOORS, BLOCK], tl.int32)
    shares = tl.zeros([_FLOORS, BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = _scaled(row_pointer, token, count, top, heat)
        reached = (logits[None, :] >= floors[:, None]) & (token < count)[None, :]
        numbers += reached.to(tl.int32)
        shares += tl.where(reached, tl.exp(logits - peak)[None, :], 0.0)
    return tl.sum(numbers, axis=1), tl.sum(shares, axis=1)


@triton.jit
def _floor(row_pointer, count, top, heat, least, number, share, BLOCK: tl.constexpr):
    """The highest floor, ``least`` or above, that ``number`` tokens and ``share`` of them reach.

    Looks at evenly spaced floors between one that enough tokens reach and one that too few do.
    """
    low = _code(least)
    high = _code(tl.where(heat == 1.0, top, 0.0)) + 1
    below, above = count, 0  # tokens that reach them; the first is an upper bound
    step = tl.arange(0, _FLOORS).to(tl.int64) + 1
    while (high - low > 1) & (below - above > 1):
        codes = low + (high - low) * step // (_FLOORS + 1)
        numbers, shares = _measure(row_pointer, count, top, heat, _value(codes), BLOCK)
        enough = (numbers >= number) & (shares >= share)
        low = tl.max(tl.where(enough, codes, low), axis=0)
        high = tl.min(tl.where(enough, high, codes), axis=0)
        below = tl.min(tl.where(enough, numbers, below), axis=0)
        above = tl.max(tl.where(enough, above, numbers), axis=0)
    return _value(low)


@triton.jit
def _filtered(row_pointer, count, top, heat, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The floor that the filters leave, as ``filters`` in their order."""
    floor = tl.full([], float("-inf"), tl.float32)
    if top_k > 0:
        floor = _floor(row_pointer, count, top, heat, floor, top_k, 0.0, BLOCK)
    if top_p < 1.0:
        same = tl.zeros([_FLOORS], tl.float32) + floor
        _, shares = _measure(row_pointer, count, top, heat, same, BLOCK)
        share = tl.max(shares, axis=0) * top_p
        floor = _floor(row_pointer, count, top, heat, floor, 1, share, BLOCK)
    if min_p > 0.0:
        floor = tl.maximum(floor, tl.where(heat == 1.0, top, 0.0) + tl.log(min_p))
    return floor


@triton.jit
def _mix(x):
    """See ``noise._mix``; in unsigned numbers shifts bring in zeros."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _exponential(token, key, second_key):
    """See ``noise.exponentials``."""
    bits = _mix(token.to(tl.uint32) * 0x9E3779B9 ^ key.to(tl.uint32, bitcast=True))
    bits = _mix(bits ^ second_key.to(tl.uint32, bitcast=True)) & 0x7FFFFFFF
    uniform = (bits.to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 2147483648.0)
    uniform = tl.minimum(uniform, 1.0 - 1.0 / 16777216.0)
    # -log1p(-u), precise for small u too (Goldberg 1991, "What Every Computer Scientist Should
    # Know About Floating-Point Arithmetic", theorem 4).
    rest = 1.0 - uniform
    gap = 1.0 - rest
    ratio = uniform / tl.where(gap == 0.0, 1.0, gap)
    return tl.where(gap == 0.0, uniform, -tl.log(rest) * ratio)


@triton.jit
def _likeliest(row_pointer, count, BLOCK: tl.constexpr):
    """The highest logit, the first token that has it, and whether all are numbers."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(row_pointer + token, mask=token < count, other=float("-inf"))
        broken |= (logits != logits).to(tl.int32)
        better = logits > best
        best = tl.where(better, logits, best)
        where = tl.where(better, token, where)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, where, count), axis=0)
    return top, token, tl.max(broken, axis=0) == 0


@triton.jit
def _race(row_pointer, count, top, heat, floor, key, second_key, BLOCK: tl.constexpr):
    """The winner among the tokens that reach ``floor``; see ``noise``."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = _scaled(row_pointer, token, count, top, heat)
        score = logits - tl.log(_exponential(token, key, second_key))
        better = (logits >= floor) & (score > best)
        best = tl.where(better, score, best)
        where = tl.where(better, token, where)
    return tl.min(tl.where(best == tl.max(best, axis=0), where, count), axis=0)


@triton.jit
def _draw(logits_pointer, wishes_pointer, out_pointer, stride, count, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits_pointer + row * stride
    wishes_pointer += row * 6
    key, second_key = tl.load(wishes_pointer), tl.load(wishes_pointer + 1)
    top_k = tl.load(wishes_pointer + 2)
    heat = tl.load(wishes_pointer + 3).to(tl.float32, bitcast=True)
    top_p = tl.load(wishes_pointer + 4).to(tl.float32, bitcast=True)
    min_p = tl.load(wishes_pointer + 5).to(tl.float32, bitcast=True)

    top, token, sound = _likeliest(row_pointer, count, BLOCK)
    token = tl.where(sound & (top < float("inf")), token, _NOT_FINITE)
    token = tl.where(sound & (top == float("-inf")), _NOTHING_LEFT, token)
    if (token >= 0) & (heat > 0.0):
        floor = _filtered(row_pointer, count, top, heat, top_k, top_p, min_p, BLOCK)
        token = _race(row_pointer, count, top, heat, floor, key, second_key, BLOCK)
    tl.store(out_pointer + row, token.to(tl.int64))


def wishes(rows: Sequence[SampleRow]) -> np.ndarray:
    """What ``draw`` wants to know of rows, int32 ``[R, 6]``: two numbers of the draw's key, top_k,
    and the bits of three fp32 numbers: temperature, 0 where the row is greedy, top_p and min_p."""
    found = np.zeros((len(rows), 6), dtype=np.int32)
    factors = found.view(np.float32)
    for index, row in enumerate(rows):
        params = row.params
        if not params.greedy:
            found[index, :3] = *key(params.seed, row.position), params.top_k
            factors[index, 3:] = max(params.temperature, COLDEST), params.top_p, params.min_p
    return found


def plain_wishes(draws: Tensor | None, like: Tensor) -> Tensor:
    """The same on the device from the ``draws`` of ``sampler.sample_plain``."""
    found = torch.zeros(len(like), 6, dtype=torch.int32, device=like.device)
    if draws is not None:
        found[:, :2], found[:, 3] = draws[:2].T, draws[2]
        found.view(torch.float32)[:, 4] = 1.0
    return found


def draw(logits: Tensor, wishes: Tensor) -> Tensor:
    """What ``sampler.sample`` gives for fp32 logits ``[R, V]`` that were shaped: int64 [R].

    ``wishes`` are those of the rows, on the device; what was captured of this may be replayed with
    others.
    """
    logits = logits.contiguous()
    count, vocab = logits.shape
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    _draw[(count,)](logits, wishes, out, logits.stride(0), vocab, BLOCK=_BLOCK, num_warps=16)
    return out
