"""Attention over the paged cache: rotate and store new tokens; mix rows with one new token.

A layer's cache is ``[blocks, 2, kv_heads, block_size, head_dim]``, index 1 key and value. Lengths,
slots and block tables are read on the device, and a grid depends on shapes alone, so a captured
launch can be replayed with other lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8  # rotated by one program
_KEYS = 64  # looked at at once
# Programs that are wanted on a device: a few for each of the 132 multiprocessors of an H100.
_PROGRAMS = 512
# Splits of a row that are brought together at once.
_PARTS = 16
# Keys of a row that are not worth splitting further.
_LEAST = 128
# The interpreter multiplies bfloat16 matrices wrongly.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rotate_write(
    qkv_pointer,
    cosine_pointer,
    sine_pointer,
    slots_pointer,
    cache_pointer,
    qkv_stride,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PART: tl.constexpr,
):
    """``PART`` heads of one token, each as its two halves ``[PART, HALF]``."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * PART + tl.arange(0, PART)[:, None]
    column = tl.arange(0, HALF)[None, :]
    place = qkv_pointer + token * qkv_stride + head * 2 * HALF + column
    inside = head < HEADS + 2 * KV_HEADS
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    dtype = first.dtype

    turning = head < HEADS + KV_HEADS
    cosine = tl.load(cosine_pointer + token * HALF + column)
    sine = tl.load(sine_pointer + token * HALF + column)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned = (wide_first * cosine - wide_second * sine).to(dtype)
    first, second = (
        tl.where(turning, turned, first),
        tl.where(turning, (wide_second * cosine + wide_first * sine).to(dtype), second),
    )
    tl.store(place, first, mask=turning)
    tl.store(place + HALF, second, mask=turning)

    slot = tl.load(slots_pointer + token)
    page = (slot // BLOCK_SIZE) * block_stride
    # Behind the queries stand all keys, then all values, as the pages of a block do.
    page += (head - HEADS) * BLOCK_SIZE * 2 * HALF
    stored = cache_pointer + page + (slot % BLOCK_SIZE) * 2 * HALF + column
    # Not by `slot >= 0` beside the others: of one truth for all Triton 3.9's interpreter makes a
    # number, and then refuses the mask.
    wanted = inside & (head >= tl.where(slot >= 0, HEADS, HEADS + 2 * KV_HEADS))
    tl.store(stored, first, mask=wanted)
    tl.store(stored + HALF, second, mask=wanted)


def rotate_write(
    cache: Tensor, qkv: Tensor, cosine: Tensor, sine: Tensor, slots: Tensor, heads: int
) -> None:
    """Turn queries and keys in place, as ``model.rotary.rotate``, and store keys and values.

    ``qkv`` is ``[N, (heads + 2 * kv_heads) * head_dim]`` with whole rows, cosine and sine
    ``[N, 1, head_dim / 2]`` fp32, ``slots`` [N] int64. A token whose slot is negative is not
    stored. ``head_dim`` is a power of two.
    """
    kv_heads, block_size, head_dim = cache.shape[2:]
    grid = (len(qkv), triton.cdiv(heads + 2 * kv_heads, _HEADS))
    _rotate_write[grid](
        qkv,
        cosine,
        sine,
        slots,
        cache,
        qkv.stride(0),
        cache.stride(0),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PART=_HEADS,
    )


@triton.jit
def _share(length, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Keys per split of a row of ``length``: equal shares in whole steps of ``LEAST``, so that a
    short row leaves most of its splits without any."""
    return tl.cdiv(tl.cdiv(length, SPLITS), LEAST) * LEAST


@triton.jit
def _dot(a, b):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # fp32 stays fp32; without this it would be cut to TF32.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _decode(
    query_pointer,
    cache_pointer,
    starts_pointer,
    lengths_pointer,
    tables_pointer,
    out_pointer,
    mixed_pointer,
    peak_pointer,
    total_pointer,
    query_stride,
    out_stride,
    block_stride,
    table_stride,
    scale,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """One split of one row and key head: the ``GROUP`` query heads that share it, ``PADDED`` for
    the tensor cores. Softmax as it goes along (Milakov and Gimelshein 2018, arXiv 1805.02867)."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(starts_pointer + row).to(tl.int64)
    if tl.load(starts_pointer + row + 1) - token != 1:
        return
    length = tl.load(lengths_pointer + row)
    share = _share(length, SPLITS, LEAST)
    begin = split * share
    end = tl.minimum(begin + share, length)
    if begin >= end and split > 0:
        return

    member = tl.arange(0, PADDED)
    column = tl.arange(0, HEAD_DIM)
    head = kv_head * GROUP + member
    real = member < GROUP
    query = tl.load(
        query_pointer + token * query_stride + head[:, None] * HEAD_DIM + column[None, :],
        mask=real[:, None],
        other=0.0,
    )
    peak = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    mixed = tl.zeros([PADDED, HEAD_DIM], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        seen = position < end
        block = tl.load(
            tables_pointer + row * table_stride + position // BLOCK_SIZE, mask=seen, other=0
        )
        at = block * block_stride + (kv_head * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        place = cache_pointer + at[:, None] + column[None, :]
        # Nothing beyond the row is read, whatever lies there.
        key = tl.load(place, mask=seen[:, None], other=0.0)
        value = tl.load(place + KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], _dot(query, tl.trans(key)) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + _dot(weights.to(value.dtype), value)
        peak = higher

    if SPLITS == 1:
        # A row without tokens gives zeros.
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        place = out_pointer + token * out_stride + head[:, None] * HEAD_DIM + column[None, :]
        tl.store(place, mixed.to(out_pointer.dtype.element_ty), mask=real[:, None])
    else:
        part = (row * KV_HEADS * GROUP + head).to(tl.int64) * SPLITS + split
        tl.store(
            mixed_pointer + part[:, None] * HEAD_DIM + column[None, :], mixed, mask=real[:, None]
        )
        tl.store(peak_pointer + part, peak, mask=real)
        tl.store(total_pointer + part, total, mask=real)


@triton.jit
def _reduce(
    starts_pointer,
    lengths_pointer,
    mixed_pointer,
    peak_pointer,
    total_pointer,
    out_pointer,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PART: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Bring the splits of one row and query head together."""
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(starts_pointer + row).to(tl.int64)
    if tl.load(starts_pointer + row + 1) - token != 1:
        return
    length = tl.load(lengths_pointer + row)
    share = _share(length, SPLITS, LEAST)
    filled = tl.cdiv(length, tl.maximum(share, 1))
    first = (row * HEADS + head).to(tl.int64) * SPLITS
    column = tl.arange(0, HEAD_DIM)
    every = tl.arange(0, SPLITS)
    peaks = tl.load(peak_pointer + first + every, mask=every < filled, other=float("-inf"))
    highest = tl.max(peaks, axis=0)
    total = tl.zeros([], tl.float32)
    mixed = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, filled, PART):  # all at once do not fit in a program's registers
        split = start + tl.arange(0, PART)
        there, part = split < filled, first + split
        peak = tl.load(peak_pointer + part, mask=there, other=float("-inf"))
        weights = tl.exp2(peak - highest)
        sums = tl.load(total_pointer + part, mask=there, other=0.0)
        place = mixed_pointer + part[:, None] * HEAD_DIM + column[None, :]
        several = tl.load(place, mask=there[:, None], other=0.0)
        total += tl.sum(sums * weights, axis=0)
        mixed += tl.sum(several * weights[:, None], axis=0)
    mixed = mixed / tl.where(total > 0, total, 1.0)
    place = out_pointer + token * out_stride + head * HEAD_DIM + column
    tl.store(place, mixed.to(out_pointer.dtype.element_ty))


def splits(rows: int, kv_heads: int, longest: int) -> int:
    """Into how many parts a row is split: a power of two, by shapes alone.

    As many as fill the device, but none that could never have keys when rows are ``longest``.
    """
    wanted = max(_PROGRAMS // (rows * kv_heads), 1)
    most = triton.cdiv(longest, _LEAST)
    return triton.next_power_of_2(min(wanted, most) + 1) // 2


def decode(
    query: Tensor,
    cache: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tables: Tensor,
    out: Tensor,
    parts: int | None = None,
) -> None:
    """Attention of the rows with one new token, whose keys and values are stored already.

    ``query`` and ``out`` are ``[N, heads, head_dim]``, heads contiguous. Row r's tokens are
    ``starts[r] : starts[r + 1]``; rows with another number than one are passed over, and what
    ``out`` holds for them stays. ``lengths`` [R] int32 count the new token; a row of length 0 gives
    zeros. ``tables`` [R, n] name the rows' blocks. ``head_dim`` is a power of two from 16.
    """
    kv_heads, block_size, head_dim = cache.shape[2:]
    rows, heads = len(lengths), query.shape[1]
    parts = parts or splits(rows, kv_heads, tables.shape[1] * block_size)
    scratch = (rows, heads, parts) if parts > 1 else (0,)
    mixed = query.new_empty(*scratch, head_dim, dtype=torch.float32)
    peak, total = query.new_empty(2, *scratch, dtype=torch.float32)
    group = heads // kv_heads
    _decode[(rows, kv_heads, parts)](
        query,
        cache,
        starts,
        lengths,
        tables,
        out,
        mixed,
        peak,
        total,
        query.stride(0),
        out.stride(0),
        cache.stride(0),
        tables.stride(0),
        head_dim**-0.5 * _LOG2_E.value,
        BLOCK_SIZE=block_size,
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        KEYS=_KEYS,
        SPLITS=parts,
        LEAST=_LEAST,
    )
    if parts > 1:
        _reduce[(rows, heads)](
            starts,
            lengths,
            mixed,
            peak,
            total,
            out,
            out.stride(0),
            HEADS=heads,
            HEAD_DIM=head_dim,
            SPLITS=parts,
            PART=min(parts, _PARTS),
            LEAST=_LEAST,
        )
