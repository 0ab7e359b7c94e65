"""A mixture of experts in two products of all of them, so that the host need not know which experts
the tokens go to: nothing waits, and a captured step may be replayed for other tokens.

Pairs of a token and an expert are sorted by their experts. A program has some pairs of one expert,
and some of its outputs; there are as many programs as there could have to be.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.triton.fused import silu_mul
from model.triton.int4 import add_product

# Pairs of a program, where experts have few on average and where they have many.
_FEW, _MANY = 16, 64
_OUTPUTS = 64
_STEP = 64
_NUMBERS = 1024


@triton.jit
def _products(
    x_pointer,
    weight_pointer,
    order_pointer,
    start_pointer,
    out_pointer,
    inputs,
    outputs,
    CHOSEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Some pairs of an expert. Those of CHOSEN experts per token take their token's row, and their
    results stand in the order of experts; without CHOSEN it is the other way round."""
    block = tl.program_id(1)
    expert = tl.arange(0, EXPERTS)
    pairs = tl.load(start_pointer + expert + 1) - tl.load(start_pointer + expert)
    blocks = (pairs + ROWS - 1) // ROWS
    over = tl.cumsum(blocks, axis=0) <= block  # whose blocks come before this one
    owner = tl.sum(over.to(tl.int32), axis=0)
    if owner >= EXPERTS:
        return
    first = tl.load(start_pointer + owner).to(tl.int64)
    first += (block - tl.sum(tl.where(over, blocks, 0), axis=0)) * ROWS
    last = tl.load(start_pointer + owner + 1)
    pair = first + tl.arange(0, ROWS)
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    step = tl.arange(0, STEP)
    here, there = pair < last, output < outputs
    place = tl.load(order_pointer + pair, mask=here, other=0)
    source, target = place // CHOSEN if CHOSEN else pair, pair if CHOSEN else place
    weight_pointer += owner.to(tl.int64) * outputs * inputs
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, inputs, STEP):
        inside = at + step < inputs
        x = tl.load(
            x_pointer + source[:, None] * inputs + at + step[None],
            mask=here[:, None] & inside[None],
            other=0.0,
        )
        weight = tl.load(
            weight_pointer + output[:, None] * inputs + at + step[None],
            mask=there[:, None] & inside[None],
            other=0.0,
        )
        total = add_product(total, x, weight)
    tl.store(
        out_pointer + target[:, None] * outputs + output[None],
        total.to(out_pointer.dtype.element_ty),
        mask=here[:, None] & there[None],
    )


@triton.jit
def _mix(found_pointer, share_pointer, out_pointer, size, CHOSEN: tl.constexpr, SIZE: tl.constexpr):
    """Some numbers of a row: the sum of what its experts found, by their shares."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = number < size
    total = tl.zeros([SIZE], tl.float32)
    for place in tl.static_range(CHOSEN):
        pair = row * CHOSEN + place
        found = tl.load(found_pointer + pair * size + number, mask=inside, other=0.0)
        total += found.to(tl.float32) * tl.load(share_pointer + pair).to(tl.float32)
    tl.store(out_pointer + row * size + number, total.to(out_pointer.dtype.element_ty), mask=inside)


def _route(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The pairs ``[N, K]`` in the order of their experts, int64 ``[N * K]``; and where those of
    each expert start, and the last's end, int32: as if there were a power of two of experts."""
    ordered, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(triton.next_power_of_2(experts) + 1, device=chosen.device)
    return order, torch.searchsorted(ordered, numbers, out_int32=True)


def mix(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``[N, hidden]``: of each row, what its experts ``chosen`` int64 ``[N, K]`` make of it, by
    their ``shares`` ``[N, K]``. ``gate_up`` is ``[E, 2 * I, hidden]`` and ``down``
    ``[E, hidden, I]``, both without gaps. A row does not depend on those beside it, but for the
    last bits where there are many."""
    (rows, hidden), count = x.shape, chosen.shape[1]
    experts, pairs = len(down), chosen.numel()
    if not pairs:
        return torch.zeros_like(x)
    block = _FEW if pairs <= _FEW * experts else _MANY
    order, starts = _route(chosen, experts)
    blocks = min(pairs, pairs // block + experts)

    def products(given: Tensor, weight: Tensor, per_token: int) -> Tensor:
        outputs, inputs = weight.shape[1:]
        out = torch.empty(pairs, outputs, dtype=x.dtype, device=x.device)
        _products[(triton.cdiv(outputs, _OUTPUTS), blocks)](
            given.contiguous(),
            weight,
            order,
            starts,
            out,
            inputs,
            outputs,
            CHOSEN=per_token,
            EXPERTS=len(starts) - 1,
            STEP=_STEP,
            ROWS=block,
            OUTPUTS=_OUTPUTS,
            num_warps=4,
        )
        return out

    found = products(silu_mul(products(x, gate_up, count)), down, 0)
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    _mix[(rows, triton.cdiv(hidden, _NUMBERS))](
        found, shares.contiguous(), out, hidden, CHOSEN=count, SIZE=_NUMBERS
    )
    return out
