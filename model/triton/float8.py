"""Numbers to float8 (e4m3) inside kernels, a scale for each row.

The bits are put together here, because the interpreter's own conversion rounds otherwise than
devices do, and older devices have none.
"""

import torch
import triton
import triton.language as tl

from model.layers import LEAST

_LEAST = tl.constexpr(LEAST)
_LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
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
    found = tl.where(tl.abs(x) < _NORMAL, small, normal)
    return (found | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def scale_of(peaks, doubts):
    """Of a row, from the largest of its numbers, and their products with zero: a maximum passes
    over what is not a number."""
    largest = tl.maximum(tl.max(peaks, axis=0), _LEAST)
    return tl.div_rn(largest, _LARGEST) + tl.sum(doubts, axis=0)


@triton.jit
def rounded(x, scale):
    """The bits of ``x`` in float8."""
    x = tl.div_rn(x, scale)
    return _code(tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST))
