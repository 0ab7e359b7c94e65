"""What Triton computes between matrix products equals the formulas in float64."""

import pytest
import torch
from torch import Tensor

from model.layers import LayerNorm, Linear, RMSNorm
from model.ops.base import Ops
from model.ops.triton import TritonOps

# One rounding to the type, and for half types one more of a factor or a sum.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2.5e-2}
DTYPES = list(TOLERANCE)
# Powers of two, one beside them, more than a block, and InternViT-6B's size, cut from a wider row.
SIZES = [(1, 1024), (3, 896), (2, 1025), (5, 3200)]


def filled(layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    for name, part in layer.named_parameters():
        setattr(layer, name, torch.nn.Parameter(torch.randn(part.shape), requires_grad=False))
    return layer.to(device, dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def formula(x: Tensor, norm: LayerNorm | RMSNorm) -> Tensor:
    x, weight = x.double(), norm.weight.double()
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight + norm.bias
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_sum_and_norm(
    kind: type[LayerNorm | RMSNorm], rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    norm = filled(kind(size, 1e-6), device, dtype)
    hidden, delta = 3 * torch.randn(2, 1, rows, size, device=device) + 1
    hidden, delta = hidden.to(dtype), delta.to(dtype)
    expected = hidden.double() + delta.double()
    total, normed = TritonOps().add_norm(hidden, delta, norm)
    assert total.shape == normed.shape == (1, rows, size)
    assert total.data_ptr() == hidden.data_ptr()
    close(total, expected, dtype)
    close(normed, formula(total, norm), dtype)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_of_a_part_of_wider_rows_changes_nothing(
    kind: type[LayerNorm | RMSNorm], device: torch.device
) -> None:
    torch.manual_seed(0)
    norm = filled(kind(96, 1e-5), device, torch.float32)
    wide = torch.randn(2, 5, 3 * 96, device=device)
    kept = wide.clone()
    part = wide.chunk(3, dim=-1)[1]
    hidden, normed = TritonOps().add_norm(part, None, norm)
    close(normed, formula(part, norm), torch.float32)
    assert hidden is part
    assert torch.equal(wide, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4864, 1000])
def test_silu_and_product(size: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = filled(Linear(8, 2 * size, bias=False), device, dtype)
    x = torch.randn(3, 8, device=device).to(dtype)
    gate, up = torch.nn.functional.linear(x, layer.weight).double().chunk(2, -1)
    found = TritonOps().gate_up(layer, x)
    close(found, gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_gelu(bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = filled(Linear(4, 1030, bias=bias), device, dtype)
    x = torch.randn(2, 3, 4, device=device).to(dtype)
    wide = torch.nn.functional.linear(x, layer.weight).double()
    if layer.bias is not None:
        wide = wide + layer.bias.double()
    found = TritonOps().linear_gelu(layer, x)
    close(found, 0.5 * wide * (1 + torch.erf(wide / 2**0.5)), dtype)


def test_half_types_round_where_torch_does(device: torch.device) -> None:
    """Nearly all values are those of the reference to the bit. The interpreter cuts bfloat16 off
    instead of rounding it, so that type is left to devices."""
    dtype = torch.float16
    torch.manual_seed(0)
    hidden, delta = torch.randn(2, 8, 896, device=device).to(dtype)
    same = []
    for kind in (RMSNorm, LayerNorm):
        norm = filled(kind(896, 1e-6), device, dtype)
        expected = Ops().add_norm(hidden, delta, norm)
        found = TritonOps().add_norm(hidden.clone(), delta, norm)
        same += [(a == b).float().mean().item() for a, b in zip(found, expected, strict=True)]
    layer = filled(Linear(16, 2 * 896, bias=False), device, dtype)
    gated = [ops.gate_up(layer, hidden[:, :16]) for ops in (TritonOps(), Ops())]
    same.append((gated[0] == gated[1]).float().mean().item())
    assert min(same) > 0.99, same
