"""Activations to float8 (e4m3), a scale per token: as they are, or while a norm or an activation
makes them. Rows are read twice, the second time from the cache, but by a norm, which holds them.

The bits are put together here, because the interpreter's own conversion rounds otherwise than
devices do, and older devices have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.layers import LEAST, Rounded
from model.triton.fused import add_norm_of, bias_gelu_of, for_rows, silu_mul_of, whole_rows

_LEAST = tl.constexpr(LEAST)
_LARGEST = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
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
def _scale(peaks, doubts):
    """Of a row, from the largest of its numbers, and their products with zero: a maximum passes
    over what is not a number."""
    largest = tl.maximum(tl.max(peaks, axis=0), _LEAST)
    return tl.div_rn(largest, _LARGEST) + tl.sum(doubts, axis=0)


@triton.jit
def _rounded(x, scale):
    """The bits of ``x`` in float8."""
    x = tl.div_rn(x, scale)
    return _code(tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST))


@triton.jit
def _made(place, bias_place, size, inside, KIND: tl.constexpr):
    """What a part of a row becomes before it is rounded, fp32."""
    if KIND == "silu_mul":
        x = silu_mul_of(place, size, inside)
    elif KIND == "bias_gelu":
        x = bias_gelu_of(place, bias_place, inside, True)
    elif KIND == "gelu":
        x = bias_gelu_of(place, bias_place, inside, False)
    else:
        x = tl.load(place, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _to_fp8(
    rows_pointer,
    bias_pointer,
    out_pointer,
    scale_pointer,
    row_stride,
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    place = rows_pointer + row * row_stride + column
    peaks = tl.zeros([BLOCK], tl.float32)
    doubts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + column < size
        x = _made(place + start, bias_pointer + start + column, size, inside, KIND)
        peaks = tl.maximum(peaks, tl.abs(x))
        doubts += x * 0.0
    scale = _scale(peaks, doubts)
    tl.store(scale_pointer + row, scale)
    for start in range(0, size, BLOCK):
        inside = start + column < size
        x = _made(place + start, bias_pointer + start + column, size, inside, KIND)
        tl.store(out_pointer + row * size + start + column, _rounded(x, scale), mask=inside)


@triton.jit
def _add_norm_to_fp8(
    hidden_pointer,
    delta_pointer,
    weight_pointer,
    bias_pointer,
    out_pointer,
    scale_pointer,
    hidden_stride,
    delta_stride,
    size,
    eps,
    ADD: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    normed = add_norm_of(
        row,
        column,
        hidden_pointer,
        delta_pointer,
        weight_pointer,
        bias_pointer,
        hidden_stride,
        delta_stride,
        size,
        eps,
        ADD,
        CENTER,
    ).to(tl.float32)
    scale = _scale(tl.abs(normed), normed * 0.0)
    tl.store(scale_pointer + row, scale)
    codes = _rounded(normed, scale)
    tl.store(out_pointer + row * size + column, codes, mask=column < size)


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As ``model.quantize.to_fp8``, for rows ``[N, size]`` that may lie apart."""
    return _rows_to_fp8(rows, rows.shape[-1], "")


def silu_mul(gate_up: Tensor) -> Rounded:
    """``fused.silu_mul`` in float8."""
    rows = whole_rows(gate_up)
    made = _rows_to_fp8(rows, rows.shape[-1] // 2, "silu_mul")
    return Rounded(*made, gate_up.shape[:-1], gate_up.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Rounded:
    """``fused.bias_gelu_`` in float8."""
    rows = whole_rows(x)
    made = _rows_to_fp8(rows, rows.shape[-1], "gelu" if bias is None else "bias_gelu", bias)
    return Rounded(*made, x.shape[:-1], x.dtype)


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Rounded]:
    """``fused.add_norm`` with the norm in float8."""
    rows = whole_rows(hidden)
    added = rows if delta is None else whole_rows(delta)
    size = rows.shape[-1]
    out, scale = _empty(len(rows), size, rows.device)
    _add_norm_to_fp8[(len(rows),)](
        rows,
        added,
        weight,
        weight if bias is None else bias,
        out.view(torch.uint8),
        scale,
        rows.stride(0),
        added.stride(0),
        size,
        eps,
        ADD=delta is not None,
        CENTER=bias is not None,
        **for_rows(size),
    )
    total = rows.view(hidden.shape) if delta is not None else hidden
    return total, Rounded(out, scale, hidden.shape[:-1], hidden.dtype)


def _rows_to_fp8(
    rows: Tensor, size: int, kind: str, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out, scale = _empty(len(rows), size, rows.device)
    _to_fp8[(len(rows),)](
        rows,
        rows if bias is None else bias,
        out.view(torch.uint8),
        scale,
        rows.stride(0),
        size,
        KIND=kind,
        BLOCK=min(_BLOCK, triton.next_power_of_2(size)),
    )
    return out, scale


def _empty(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for rows in float8 and their scales."""
    rows = torch.empty(count, size, dtype=torch.float8_e4m3fn, device=device)
    return rows, torch.empty(count, 1, dtype=torch.float32, device=device)
