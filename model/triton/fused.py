"""What stands between two matrix products of a layer: sums with norms, and activations.

All of it is bound by memory: a kernel reads its inputs once and computes in fp32. It rounds where
torch's own operations would, so results differ from those in the last bit at most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.triton.float8 import rounded, scale_of

_BLOCK = 1024


@triton.jit
def _add_norm(
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
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. With ``ADD`` the sum takes the place of ``hidden``; ``CENTER`` is LayerNorm; with
    ``ROUND`` the norm is in float8."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    place = hidden_pointer + row * hidden_stride + column
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    dtype = hidden_pointer.dtype.element_ty
    if ADD:
        delta = tl.load(delta_pointer + row * delta_stride + column, mask=inside, other=0.0)
        total = (x + delta.to(tl.float32)).to(dtype)
        tl.store(place, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_pointer + column, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
        bias = tl.load(bias_pointer + column, mask=inside, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * weight + bias
    else:
        scaled = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
        normed = scaled.to(dtype).to(tl.float32) * weight
    normed = normed.to(dtype)
    if ROUND:
        wide = normed.to(tl.float32)
        scale = scale_of(tl.abs(wide), wide * 0.0)
        tl.store(scale_pointer + row, scale)
        normed = rounded(wide, scale)
    tl.store(out_pointer + row * size + column, normed, mask=inside)


def add_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``hidden + delta``, which overwrites ``hidden``, and its norm: both ``[..., size]``.

    LayerNorm with a ``bias`` [size], else RMSNorm. Rows may lie apart, as slices of wider ones do.
    """
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return add_norm_into(normed, None, hidden, delta, weight, bias, eps), normed


def add_norm_into(
    out: Tensor,
    scale: Tensor | None,
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The same with a place for the norm: rows, or with a place for their ``scale`` rows of float8
    as uint8. The sum alone is given back."""
    size = hidden.shape[-1]
    rows = whole_rows(hidden)
    added = rows if delta is None else whole_rows(delta)
    block = triton.next_power_of_2(size)
    _add_norm[(len(rows),)](
        rows,
        added,
        weight,
        weight if bias is None else bias,
        out,
        weight if scale is None else scale,
        rows.stride(0),
        added.stride(0),
        size,
        eps,
        ADD=delta is not None,
        CENTER=bias is not None,
        ROUND=scale is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )
    return rows.view(hidden.shape) if delta is not None else hidden


@triton.jit
def silu_mul_of(place, size, inside):
    """Of gates at ``place`` and what they gate, ``size`` further on, in their type."""
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + size, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (silu * up).to(gate.dtype)


@triton.jit
def _silu_mul(pointer, out_pointer, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    product = silu_mul_of(pointer + row * 2 * size + column, size, inside)
    tl.store(out_pointer + row * size + column, product, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of contiguous rows ``[..., 2 * size]``, gates first: ``[..., size]``."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    grid = (out.numel() // size, triton.cdiv(size, _BLOCK))
    _silu_mul[grid](gate_up, out, size, BLOCK=_BLOCK)
    return out


@triton.jit
def bias_gelu_of(place, bias_place, inside, BIAS: tl.constexpr):
    """Of numbers at ``place``, in their type."""
    x = tl.load(place, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if BIAS:
        wide += tl.load(bias_place, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * wide * (1 + tl.erf(wide * 0.7071067811865476))
    return gelu.to(x.dtype)


@triton.jit
def _bias_gelu(pointer, bias_pointer, size, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    place = pointer + row * size + column
    tl.store(place, bias_gelu_of(place, bias_pointer + column, inside, BIAS), mask=inside)


def bias_gelu_(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)`` by the error function, in place of contiguous ``x`` [..., size]."""
    size = x.shape[-1]
    grid = (x.numel() // size, triton.cdiv(size, _BLOCK))
    _bias_gelu[grid](x, x if bias is None else bias, size, BIAS=bias is not None, BLOCK=_BLOCK)
    return x


def whole_rows(x: Tensor) -> Tensor:
    """``[..., size]`` as ``[N, size]`` whose rows are whole; a copy only if it must be one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
