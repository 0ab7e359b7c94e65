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
    owner_pointer,
    first_pointer,
    last_pointer,
    out_pointer,
    inputs,
    outputs,
    CHOSEN: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Some pairs of an expert. Those of CHOSEN experts per token take their token's row, and their
    results stand in the order of experts; without CHOSEN it is the other way round."""
    block = tl.program_id(1)
    first, last = tl.load(first_pointer + block), tl.load(last_pointer + block)
    if first >= last:
        return
    pair = first + tl.arange(0, ROWS)
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    step = tl.arange(0, STEP)
    here, there = pair < last, output < outputs
    place = tl.load(order_pointer + pair, mask=here, other=0)
    source, target = place // CHOSEN if CHOSEN else pair, pair if CHOSEN else place
    weight_pointer += tl.load(owner_pointer + block) * outputs * inputs
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


def _route(chosen: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs ``[N, K]`` in the order of their experts, ``[N * K]``; and for each block of at
    most ``rows`` of them their expert, the first, and where those of the expert end: no more than
    the first where a block has none. All int64."""
    ordered, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    starts = torch.searchsorted(ordered, numbers)
    ends = torch.searchsorted(ordered, numbers, right=True)
    blocks = (ends - starts + rows - 1) // rows
    until = blocks.cumsum(0)
    block = torch.arange(min(len(order), len(order) // rows + experts), device=chosen.device)
    # Blocks that are too many are the last expert's, and begin behind its pairs.
    owner = torch.searchsorted(until, block, right=True).clamp(max=experts - 1)
    first = starts[owner] + (block - until[owner] + blocks[owner]) * rows
    return order, owner, first, ends[owner]


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
    order, owner, first, last = _route(chosen, experts, block)

    def products(x: Tensor, weight: Tensor, chosen: int) -> Tensor:
        outputs, inputs = weight.shape[1:]
        out = torch.empty(pairs, outputs, dtype=x.dtype, device=x.device)
        _products[(triton.cdiv(outputs, _OUTPUTS), len(owner))](
            x.contiguous(),
            weight,
            order,
            owner,
            first,
            last,
            out,
            inputs,
            outputs,
            CHOSEN=chosen,
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
