"""The draw on CUDA devices: one kernel from shaped logits to a token, without a sort.

It keeps the tokens that ``filters`` keeps, ties included, and draws with the numbers of ``noise``.
Every filter keeps what reaches some floor. A row is read twice: for its highest logit, and to note
the tokens that may reach the floor or win the race, which are few. Among them the floor is searched
for by bisection over the numbers there are in fp32, counting tokens or summing their probabilities,
until no more than one token is in doubt. A row is one program's, so no draw depends on its batch.

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

_BLOCK = 4096  # logits looked at at once
_FEW = 1024  # of the tokens that were noted
# Rows of one launch, which bounds what notes take: about the multiprocessors of a device.
_ROWS = 128
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
# Floors tried by one look at the tokens.
_FLOORS = tl.constexpr(4)
# So far below the likeliest token none wins: exponential numbers of 31 bits are from 2^-32 to 17,
# their logarithms from -22.2 to 2.8.
_HOPELESS = tl.constexpr(26.0)


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
def _scaled(row_pointer, token, inside, top, heat):
    """Logits as ``Temperature`` leaves them, which touches no row whose temperature is 1."""
    logits = tl.load(row_pointer + token, mask=inside, other=float("-inf"))
    return tl.where(heat == 1.0, logits, tl.div_rn(logits - top, heat))


@triton.jit
def _likeliest(row_pointer, count, BLOCK: tl.constexpr):
    """The highest logit, the first token that has it, whether all are numbers, and the highest of
    every ``BLOCK``-th token, ``[BLOCK]``."""
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
    return top, token, tl.max(broken, axis=0) == 0, best


@triton.jit
def _floors_between(low, high):
    """Codes evenly between two."""
    return low + (high - low) * (tl.arange(0, _FLOORS).to(tl.int64) + 1) // (_FLOORS + 1)


@triton.jit
def _reached(values, number):
    """The highest number that so many of the values reach."""
    low, high = _code(tl.full([], float("-inf"), tl.float32)), _code(tl.max(values, axis=0)) + 1
    while high - low > 1:
        codes = _floors_between(low, high)
        reached = values[None, :] >= _value(codes)[:, None]
        enough = tl.sum(reached.to(tl.int32), axis=1) >= number
        low = tl.max(tl.where(enough, codes, low), axis=0)
        high = tl.min(tl.where(enough, high, codes), axis=0)
    return _value(low)


@triton.jit
def _bound(best, count, top, heat, top_k, top_p, min_p):
    """What no token is below that filters keep and that may win.

    So many of every ``BLOCK``-th token's best as top_k reach the first; below the second all tokens
    together do not make up the probability that top_p leaves out.
    """
    peak = tl.where(heat == 1.0, top, 0.0)
    bound = peak - _HOPELESS
    if top_k > 0:
        reached = _reached(best, top_k)
        reached = tl.where(heat == 1.0, reached, tl.div_rn(reached - top, heat))
        bound = tl.maximum(bound, reached)
    elif top_p < 1.0:
        bound = tl.maximum(bound, peak + tl.log((1.0 - top_p) / count) - 0.001)
    return bound


@triton.jit
def _note(row_pointer, notes_pointer, count, top, heat, bound, BLOCK: tl.constexpr):
    """Write down the tokens from ``bound`` on, in their order. Their number, and the sum of all
    tokens' shares: probabilities over that of the likeliest."""
    peak = tl.where(heat == 1.0, top, 0.0)
    noted = tl.zeros([], tl.int32)
    shares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = _scaled(row_pointer, token, token < count, top, heat)
        shares += tl.exp(logits - peak)
        wanted = (logits >= bound).to(tl.int32)
        place = noted + tl.cumsum(wanted, axis=0) - 1
        tl.store(notes_pointer + place, token, mask=wanted > 0)
        noted += tl.sum(wanted, axis=0)
    tl.debug_barrier()  # what some threads wrote others will read
    return noted, tl.sum(shares, axis=0)


@triton.jit
def _measure(row_pointer, notes_pointer, noted, top, heat, floors, FEW: tl.constexpr):
    """How many of the noted tokens reach each of the floors, and the sum of their shares."""
    peak = tl.where(heat == 1.0, top, 0.0)
    numbers = tl.zeros([_FLOORS, FEW], tl.int32)
    shares = tl.zeros([_FLOORS, FEW], tl.float32)
    for start in range(0, noted, FEW):
        place = start + tl.arange(0, FEW)
        token = tl.load(notes_pointer + place, mask=place < noted, other=0)
        logits = _scaled(row_pointer, token, place < noted, top, heat)
        reached = logits[None, :] >= floors[:, None]
        numbers += reached.to(tl.int32)
        shares += tl.where(reached, tl.exp(logits - peak)[None, :], 0.0)
    return tl.sum(numbers, axis=1), tl.sum(shares, axis=1)


@triton.jit
def _floor(row_pointer, notes_pointer, noted, top, heat, least, number, share, FEW: tl.constexpr):
    """The highest floor, ``least`` or above, that ``number`` tokens and ``share`` of them reach.

    Looks at floors between one that enough tokens reach and one that too few do.
    """
    low = _code(least)
    high = _code(tl.where(heat == 1.0, top, 0.0)) + 1
    below, above = noted, 0  # tokens that reach them; the first is an upper bound
    while (high - low > 1) & (below - above > 1):
        codes = _floors_between(low, high)
        numbers, shares = _measure(row_pointer, notes_pointer, noted, top, heat, _value(codes), FEW)
        enough = (numbers >= number) & (shares >= share)
        low = tl.max(tl.where(enough, codes, low), axis=0)
        high = tl.min(tl.where(enough, high, codes), axis=0)
        below = tl.min(tl.where(enough, numbers, below), axis=0)
        above = tl.max(tl.where(enough, above, numbers), axis=0)
    return _value(low)


@triton.jit
def _filtered(
    row_pointer,
    notes_pointer,
    count,
    best,
    top,
    heat,
    top_k,
    top_p,
    min_p,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """The floor that the filters leave, as ``filters`` in their order, and how many tokens were
    noted, all that reach it among them."""
    floor = _bound(best, count, top, heat, top_k, top_p, min_p)
    noted, total = _note(row_pointer, notes_pointer, count, top, heat, floor, BLOCK)
    if top_k > 0:
        floor = _floor(row_pointer, notes_pointer, noted, top, heat, floor, top_k, 0.0, FEW)
        same = tl.zeros([_FLOORS], tl.float32) + floor
        _, shares = _measure(row_pointer, notes_pointer, noted, top, heat, same, FEW)
        total = tl.max(shares, axis=0)
    if top_p < 1.0:
        share = total * top_p
        floor = _floor(row_pointer, notes_pointer, noted, top, heat, floor, 1, share, FEW)
    if min_p > 0.0:
        floor = tl.maximum(floor, tl.where(heat == 1.0, top, 0.0) + tl.log(min_p))
    return floor, noted


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
def _race(
    row_pointer,
    notes_pointer,
    count,
    top,
    heat,
    floor,
    key,
    second_key,
    NOTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The winner among the tokens that reach ``floor``, see ``noise``: of all, or of those noted,
    which are ``count`` then."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < count
        if NOTED:
            token = tl.load(notes_pointer + token, mask=inside, other=0)
        logits = _scaled(row_pointer, token, inside, top, heat)
        score = logits - tl.log(_exponential(token, key, second_key))
        better = (logits >= floor) & (score > best)
        best = tl.where(better, score, best)
        where = tl.where(better, token, where)
    first = tl.where(best == tl.max(best, axis=0), where, 2147483647)
    return tl.min(first, axis=0)


@triton.jit
def _draw(
    logits_pointer,
    wishes_pointer,
    notes_pointer,
    out_pointer,
    stride,
    count,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    row_pointer = logits_pointer + row * stride
    notes_pointer += row * count
    wishes_pointer += row * 6
    key, second_key = tl.load(wishes_pointer), tl.load(wishes_pointer + 1)
    top_k = tl.load(wishes_pointer + 2)
    heat = tl.load(wishes_pointer + 3).to(tl.float32, bitcast=True)
    top_p = tl.load(wishes_pointer + 4).to(tl.float32, bitcast=True)
    min_p = tl.load(wishes_pointer + 5).to(tl.float32, bitcast=True)

    top, token, sound, best = _likeliest(row_pointer, count, BLOCK)
    token = tl.where(sound & (top < float("inf")), token, _NOT_FINITE)
    token = tl.where(sound & (top == float("-inf")), _NOTHING_LEFT, token)
    if (token >= 0) & (heat > 0.0):
        if (top_k > 0) | (top_p < 1.0) | (min_p > 0.0):
            floor, noted = _filtered(
                row_pointer, notes_pointer, count, best, top, heat, top_k, top_p, min_p, BLOCK, FEW
            )
            token = _race(
                row_pointer, notes_pointer, noted, top, heat, floor, key, second_key, True, FEW
            )
        else:
            none = float("-inf")
            token = _race(
                row_pointer, notes_pointer, count, top, heat, none, key, second_key, False, BLOCK
            )
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
    notes = torch.empty(min(count, _ROWS), vocab, dtype=torch.int32, device=logits.device)
    sizes = logits.stride(0), vocab
    for start in range(0, count, _ROWS):
        part = slice(start, min(start + _ROWS, count))
        _draw[(part.stop - start,)](
            logits[part],
            wishes[part],
            notes,
            out[part],
            *sizes,
            BLOCK=_BLOCK,
            FEW=_FEW,
            num_warps=16,
        )
    return out
