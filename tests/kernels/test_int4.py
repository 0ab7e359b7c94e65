"""Products with weights in four bits are those with the weights that they stand for."""

import pytest
import torch
from torch import Tensor

from model.awq import FourBits, Int4Linear
from model.layers import Linear
from model.triton.int4 import linear, suits

# Of the products' deviation, at most: sums are made in another order, and then rounded. Where
# devices round to bfloat16, weights too, the interpreter cuts.
NEAR = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 8e-2}


def made(outputs: int, inputs: int, group: int, dtype: torch.dtype, *, bias: bool) -> Int4Linear:
    """A layer of random integers, with zeros and scales that differ from group to group."""
    torch.manual_seed(outputs + inputs)
    with torch.device("meta"):
        layer = Int4Linear(Linear(inputs, outputs, bias=False), group)
    groups = inputs // group
    part = FourBits(
        torch.randint(16, (outputs, inputs), dtype=torch.uint8),
        torch.randint(16, (outputs, groups), dtype=torch.uint8),
        torch.rand(outputs, groups).half().float() / 8,
    )
    for name, tensor in layer.packed(part).items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(layer.dequantized(slice(None)), part.dequantized())
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(outputs).to(dtype), requires_grad=False)
    return layer


def parameters(layer: Int4Linear) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return layer.weight, layer.zero, layer.scale, layer.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(1, 40, 256, 128), (5, 33, 192, 64), (70, 72, 96, 32), (17, 16, 512, 256)],
)
def test_any_rows_outputs_and_groups(
    rows: int, outputs: int, inputs: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    layer = made(outputs, inputs, group, dtype, bias=rows != 5).to(device)
    x = torch.randn(rows, inputs).to(device, dtype)
    found = linear(x, *parameters(layer))
    expected = x.double() @ layer.dequantized(slice(None)).to(dtype).double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    assert (found.dtype, found.shape) == (dtype, (rows, outputs))
    assert (found.double() - expected).abs().max() < NEAR[dtype] * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_as_the_loader_does(dtype: torch.dtype, device: torch.device) -> None:
    """Seen one by one: multiplied with one of the inputs alone."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter cuts")
    layer = made(40, 256, 64, dtype, bias=False).to(device)
    found = linear(torch.eye(256, dtype=dtype, device=device), *parameters(layer))
    assert torch.equal(found, layer.dequantized(slice(None)).to(dtype).T)


def test_rows_may_lie_apart_and_there_may_be_more_dimensions(device: torch.device) -> None:
    layer = made(48, 64, 32, torch.float32, bias=True).to(device)
    wide = torch.randn(2, 3, 200, device=device)
    found = linear(wide[..., 40:104], *parameters(layer))
    assert torch.equal(found, linear(wide[..., 40:104].contiguous(), *parameters(layer)))
    assert found.shape == (2, 3, 48)
    assert linear(wide[:, :0, :64], *parameters(layer)).shape == (2, 0, 48)


def test_the_layer_uses_it_where_it_can(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def by_kernel(*parts: Tensor) -> Tensor:
        asked.append(parts)
        return linear(*parts)

    monkeypatch.setattr("model.triton.int4.linear", by_kernel)
    x = torch.randn(3, 192, device=device)
    for group, missing, count in ((32, "not here", 0), (32, None, 1), (96, None, 1), (16, None, 1)):
        monkeypatch.setattr("model.triton.missing", lambda _, why=missing: why)
        layer = made(20, 192, group, torch.float32, bias=True).to(device)
        expected = x.double() @ layer.dequantized(slice(None)).double().T + layer.bias
        assert (layer(x) - expected).abs().max() < 1e-5 * expected.std()
        assert len(asked) == count
    assert [group for group in range(1, 300) if suits(group)] == [32, 64, 128, 256]
