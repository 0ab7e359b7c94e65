"""Activations to float8 (e4m3), a scale per token: read twice, the second time from the cache.

The bits are put together here, because the interpreter's own conversion rounds otherwise than
devices do, and older devices have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


# 2^14: in fp32, what is added to it is rounded to the steps of e4m3 below 2^-6.
_STEPS = tl.constexpr(16384.0)
_STEPS_BITS = tl.constexpr(0x46800000)
_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def _code(x):
    """The bits of the e4m3 number nearest to ``x``, of two the even one; not beyond 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Of 23 bits of mantissa 3 stay, and the exponent's bias becomes 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (tl.abs(x) + _STEPS).to(tl.int32, bitcast=True) - _STEPS_BITS
    code = tl.where(tl.abs(x) < _NORMAL, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _to_fp8(
    rows_pointer,
    out_pointer,
    scale_pointer,
    row_stride,
    size,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place = rows_pointer + row * row_stride
    peaks = tl.zeros([BLOCK], tl.float32)
    doubts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        x = tl.load(place + start + column, mask=start + column < size, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(x.to(tl.float32)))
        doubts += x.to(tl.float32) * 0.0
    scale = tl.div_rn(tl.maximum(tl.max(peaks, axis=0), LEAST), LARGEST)
    scale += tl.sum(doubts, axis=0)  # a maximum passes over what is not a number
    tl.store(scale_pointer + row, scale)
    for start in range(0, size, BLOCK):
        x = tl.load(place + start + column, mask=start + column < size, other=0.0)
        x = tl.div_rn(x.to(tl.float32), scale)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        tl.store(out_pointer + row * size + start + column, _code(x), mask=start + column < size)


def to_fp8(rows: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """As ``model.quantize.to_fp8``, for rows ``[N, size]`` that may lie apart."""
    count, size = rows.shape
    out = torch.empty(count, size, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    _to_fp8[(count,)](
        rows,
        out.view(torch.uint8),
        scale,
        rows.stride(0),
        size,
        LEAST=least,
        LARGEST=torch.finfo(out.dtype).max,
        BLOCK=min(_BLOCK, triton.next_power_of_2(size)),
    )
    return out, scale
