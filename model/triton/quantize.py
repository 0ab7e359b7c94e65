"""Activations to float8 (e4m3), a scale per token: as they are, or while a norm or an activation
makes them. Rows are read twice, the second time from the cache, but by a norm, which holds them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.layers import Rounded
from model.triton import fused
from model.triton.float8 import rounded, scale_of
from model.triton.fused import bias_gelu_of, silu_mul_of, whole_rows

_BLOCK = 4096


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
    scale = scale_of(peaks, doubts)
    tl.store(scale_pointer + row, scale)
    for start in range(0, size, BLOCK):
        inside = start + column < size
        x = _made(place + start, bias_pointer + start + column, size, inside, KIND)
        tl.store(out_pointer + row * size + start + column, rounded(x, scale), mask=inside)


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
    out, scale = _empty(hidden.numel() // hidden.shape[-1], hidden.shape[-1], hidden.device)
    total = fused.add_norm_into(out.view(torch.uint8), scale, hidden, delta, weight, bias, eps)
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
