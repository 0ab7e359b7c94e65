"""A mixture of experts in two products is what its experts make of each row, one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.mlp import Experts
from model.ops import Ops
from model.ops.triton import TritonOps
from model.quantize import Int8Linear
from model.schema import ExpertsConfig
from model.triton.experts import _route, mix

# Of the results' deviation, at most: sums are made in another order, and then rounded, three times
# in a row in 16 bits. Where devices round to bfloat16 the interpreter cuts, 1/128 at most, and the
# largest result is some four deviations.
NEAR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.125}


def weights(experts: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(experts + hidden + inner)
    up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    return up / hidden**0.5, down / inner**0.5


def choices(rows: int, experts: int, count: int) -> tuple[Tensor, Tensor]:
    """Some experts more often than others, the last never, unless all are taken."""
    likely = torch.rand(rows, experts) + torch.linspace(2, 0, experts)
    likely[:, -1] = -1.0
    return likely.topk(count).indices, torch.rand(rows, count)


def one_by_one(x: Tensor, chosen: Tensor, shares: Tensor, up: Tensor, down: Tensor) -> Tensor:
    mixed = torch.zeros_like(x)
    for row, numbers in enumerate(chosen.tolist()):
        for place, number in enumerate(numbers):
            gate, wide = (up[number] @ x[row]).chunk(2)
            mixed[row] += shares[row, place] * (down[number] @ (gate.sigmoid() * gate * wide))
    return mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "experts", "count", "hidden", "inner"),
    [
        (1, 4, 2, 64, 32),
        (20, 1, 1, 64, 32),
        (5, 6, 3, 100, 72),
        (40, 3, 3, 72, 80),
        (75, 5, 4, 130, 65),
    ],
)
def test_any_rows_and_experts(
    rows: int, experts: int, count: int, hidden: int, inner: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    up, down = (part.to(dtype) for part in weights(experts, hidden, inner))
    x = torch.randn(rows, hidden).to(dtype)
    chosen, shares = choices(rows, experts, count)
    given = x, chosen, shares.to(dtype), up, down
    expected = one_by_one(*(part.double() if part.is_floating_point() else part for part in given))
    found = mix(*(part.to(device) for part in given)).cpu()
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert (found.double() - expected).abs().max() < NEAR[dtype] * expected.std()


@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_all_may_go_to_the_same_experts(rows: int, device: torch.device) -> None:
    up, down = weights(9, 64, 32)
    x, chosen = torch.randn(rows, 64), torch.tensor([7, 2]).repeat(rows, 1)
    shares = torch.rand(rows, 2)
    expected = one_by_one(x, chosen, shares, up, down)
    found = mix(*(part.to(device) for part in (x, chosen, shares, up, down))).cpu()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_those_beside_it(device: torch.device) -> None:
    up, down = (part.to(device) for part in weights(8, 64, 32))
    x = torch.randn(20, 64, device=device)
    chosen, shares = (part.to(device) for part in choices(20, 8, 3))
    together = mix(x, chosen, shares, up, down)
    for row in (0, 7, 19):
        part = slice(row, row + 1)
        alone = mix(x[part], chosen[part], shares[part], up, down)
        # The interpreter's products are numpy's, whose last bits depend on a row's place.
        torch.testing.assert_close(alone, together[part], atol=1e-6, rtol=0)


def test_there_may_be_no_rows(device: torch.device) -> None:
    up, down = (part.to(device) for part in weights(4, 32, 16))
    none = torch.zeros(0, 32, device=device)
    chosen = torch.zeros(0, 2, dtype=torch.long, device=device)
    assert mix(none, chosen, none[:, :2], up, down).shape == (0, 32)


def test_routing_is_a_few_launches(device: torch.device) -> None:
    """In a step of few tokens each takes as long as reading an expert."""

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            launched.append(func)
            return func(*args, **kwargs or {})

    launched: list[Any] = []
    chosen = choices(16, 8, 2)[0].to(device)
    with Launches():
        _route(chosen, 8)
    assert len(launched) <= 5


def mixture(device: torch.device) -> Experts:
    torch.manual_seed(0)
    config = ExpertsConfig(5, chosen=2, intermediate_size=48, normalised=True, dense=frozenset())
    made = Experts(64, config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.to(device)


@torch.inference_mode()
def test_a_layers_weights_are_laid_side_by_side(device: torch.device) -> None:
    made, ops = mixture(device), TritonOps()
    x = torch.randn(7, 64, device=device)
    expected = made(x, Ops())
    taken = sum(parameter.nbytes for parameter in made.parameters())
    ops.prepare(list(made.modules()), None)
    assert not ops.experts_wait
    torch.testing.assert_close(made(x, ops), expected, atol=1e-5, rtol=0)
    # The layers have their parts of them: nothing is there twice.
    held = [each.untyped_storage() for each in (*made.parameters(), *ops._stacked[made.experts])]
    assert sum({each.data_ptr(): each.nbytes() for each in held}.values()) == taken
    torch.testing.assert_close(made(x, Ops()), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_quantised_experts_are_computed_one_by_one(device: torch.device) -> None:
    made, ops = mixture(device), TritonOps()
    for mlp in made.experts:
        mlp.down = Int8Linear(mlp.down)
    ops.prepare(list(made.modules()), None)
    assert ops.experts_wait
    x = torch.randn(7, 64, device=device)
    torch.testing.assert_close(made(x, ops), made(x, Ops()), atol=1e-5, rtol=0)


def test_a_model_without_experts_waits_for_none() -> None:
    ops = TritonOps()
    ops.prepare([torch.nn.Linear(2, 2)], None)
    assert not ops.experts_wait
