"""A linear layer whose weight stays in four bits until it is multiplied (``model.awq``).

A program has some rows of the activations and some of the weight's, and goes through all inputs in
their order. Weights are expanded in registers, to the values that the plain path multiplies with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies bfloat16 matrices wrongly.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
# Bytes of the packed weight, each of two inputs, that a step of the loop takes of a row.
_STEP = 64
# What a product takes at least, of inputs and of rows.
_LEAST = 16
_ROWS = 64
_OUTPUTS = 64
_FEW_OUTPUTS = 32  # where there are few rows: more programs read the weight at once


@triton.jit
def add_product(total, x, weight):
    """``total + x @ weight.T``; fp32 stays fp32."""
    if _WIDEN:
        x, weight = x.to(tl.float32), weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _weight(numbers, zero, scale, dtype: tl.constexpr):
    """[OUTPUTS, STEP], as ``model.awq`` computes and rounds it."""
    wide = numbers.to(tl.float32) - zero.to(tl.float32)[:, None]
    return (wide * scale[:, None]).to(dtype)


@triton.jit
def _linear(
    x_pointer,
    weight_pointer,
    zero_pointer,
    scale_pointer,
    bias_pointer,
    out_pointer,
    rows,
    outputs,
    half,  # inputs / 2
    x_stride,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Some rows and some outputs."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    byte = tl.arange(0, STEP)
    here, there = row < rows, output < outputs
    dtype = x_pointer.dtype.element_ty
    groups = 2 * half // GROUP
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, half, STEP):
        group = first // (GROUP // 2)
        packed = tl.load(
            weight_pointer + output[:, None] * half + first + byte[None], there[:, None], other=0
        )
        zero = tl.load(zero_pointer + output * groups + group, mask=there, other=0)
        scale = tl.load(scale_pointer + output * groups + group, mask=there, other=0.0)
        # The lower bits are the first half of the group, the upper ones the second.
        place = x_pointer + row[:, None] * x_stride + first + group * (GROUP // 2) + byte[None]
        low = tl.load(place, mask=here[:, None], other=0.0)
        high = tl.load(place + GROUP // 2, mask=here[:, None], other=0.0)
        weight = _weight(packed & 15, zero, scale, dtype)
        total = add_product(total, low, weight)
        weight = _weight(packed >> 4, zero, scale, dtype)
        total = add_product(total, high, weight)
    if BIAS:
        total += tl.load(bias_pointer + output, mask=there, other=0.0).to(tl.float32)[None]
    place = out_pointer + row[:, None] * outputs + output[None]
    tl.store(place, total.to(dtype), mask=here[:, None] & there[None])


def suits(group: int) -> bool:
    """Whether so many inputs can share a scale: products take sixteen of a half of them."""
    return group >= 2 * _LEAST and group & (group - 1) == 0


def linear(x: Tensor, weight: Tensor, zero: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``[..., inputs]``, whose rows may lie apart, to ``[..., outputs]``, of the type of ``x``, by
    the parameters of an ``Int4Linear`` whose group ``suits``."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    outputs, half = weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    group = 2 * half // zero.shape[1]
    few = len(flat) <= _LEAST
    rows = _LEAST if few else _ROWS
    wide = _FEW_OUTPUTS if few else _OUTPUTS
    _linear[(triton.cdiv(outputs, wide), triton.cdiv(len(flat), rows))](
        flat,
        weight,
        zero,
        scale,
        scale if bias is None else bias,
        out,
        len(flat),
        outputs,
        half,
        flat.stride(0),
        GROUP=group,
        STEP=min(group // 2, _STEP),
        ROWS=rows,
        OUTPUTS=wide,
        BIAS=bias is not None,
        num_warps=4,
    )
    return out
