"""Rows in float8 by the kernel are torch's, to the bit, and what a norm or an activation makes at
once is what is made of it alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.layers import Activations, LayerNorm, Linear, RMSNorm, Rounded
from model.ops.base import Ops
from model.ops.triton import TritonOps
from model.quantize import PRODUCTS, Fp8Linear
from model.quantize import to_fp8 as reference
from model.triton.quantize import to_fp8
from tests import fp8
from tests.kernels.test_fused_ops import SIZES, filled


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.triton.missing", lambda device: "not to be used")


def assert_equal(rows: Tensor) -> None:
    (found, scale), (expected, expected_scale) = to_fp8(rows), reference(rows)
    assert found.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, expected_scale)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_size_and_magnitude(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for size in (16, 3584, 5000, 18944 // 2):
        rows = torch.randn(6, size) * torch.logspace(-4, 4, 6)[:, None]
        rows[1, size // 2 :] *= 1e-5  # below the least normal number of its scale
        rows[2] = 0
        assert_equal(rows.to(device, dtype))
    wide = torch.randn(5, 200).to(device, dtype)
    assert_equal(wide[:, 40:104])  # rows that lie apart


def test_every_number_and_everything_between_two(device: torch.device) -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    up, down = (middles.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    positive = torch.cat((codes, middles, up, down))
    row = torch.cat((positive, -positive))[None].to(device)
    assert float(row.max()) == 448.0  # so that the scale is 1
    assert_equal(row)
    found, _ = to_fp8(row)
    assert found[0, :127].view(torch.uint8).tolist() == list(range(127))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at infinity times 0
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_one_row(bad: float, device: torch.device) -> None:
    rows = torch.ones(3, 40, device=device)
    rows[1, 7] = bad
    _, scale = to_fp8(rows)
    assert scale.isfinite()[:, 0].tolist() == [True, False, True]


def quantised(outputs: int, inputs: int, bias: bool) -> tuple[Fp8Linear, Any]:
    layer = Linear(inputs, outputs, bias=bias)
    filled(layer, torch.device("cpu"), torch.bfloat16)
    return Fp8Linear(layer, PRODUCTS[0]), layer


def assert_rounded(found: Activations, expected: Tensor) -> None:
    """The same as rounding what was made."""
    assert isinstance(found, Rounded)
    rows, scale = reference(expected.flatten(0, -2))
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.rows.view(torch.uint8), rows.view(torch.uint8))
    assert (found.lead, found.dtype) == (expected.shape[:-1], expected.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_a_norm_rounds_what_it_makes(
    kind: type[LayerNorm | RMSNorm], rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    norm = filled(kind(size, 1e-6), device, dtype)
    taker, plain = quantised(16, size, False)
    hidden, delta = (3 * torch.randn(2, 1, rows, size, device=device) + 1).to(dtype)
    hidden[0, 0] = delta[0, 0] = 0
    for added in (delta, None):
        ops = TritonOps()
        total, expected = ops.add_norm(hidden.clone(), added, norm)
        found_total, found = ops.add_norm_for(hidden.clone(), added, norm, taker)
        assert torch.equal(found_total, total)
        assert_rounded(found, expected)
        assert isinstance(ops.add_norm_for(hidden.clone(), added, norm, plain)[1], Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [5, 4096, 5000])
@pytest.mark.parametrize("kind", ["silu_mul", "gelu", "gelu without bias"])
def test_an_activation_rounds_what_it_makes(
    kind: str, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    wide = 2 * size if kind == "silu_mul" else size
    layer = filled(Linear(8, wide, bias=kind == "gelu"), device, dtype)
    taker, plain = quantised(16, size, False)
    x = torch.randn(3, 8, device=device).to(dtype)
    x[1] = 0
    ops = TritonOps()
    if kind == "silu_mul":
        assert_rounded(ops.gate_up_for(layer, x, taker), ops.gate_up(layer, x))
        assert isinstance(ops.gate_up_for(layer, x, plain), Tensor)
    else:
        x = x[None]
        assert_rounded(ops.linear_gelu_for(layer, x, taker), ops.linear_gelu(layer, x))
        assert isinstance(ops.linear_gelu_for(layer, x, plain), Tensor)


@fp8.needed
def test_layers_in_float8_take_what_was_rounded_for_them() -> None:
    """One behind the other, of rounded numbers as of their own; with a bias once."""
    torch.manual_seed(0)
    first, second = quantised(48, 32, True)[0], quantised(32, 48, True)[0]
    norm = filled(LayerNorm(32, 1e-6), torch.device("cpu"), torch.bfloat16)
    x = torch.randn(2, 5, 32).bfloat16()
    found = []
    for ops in (Ops(), TritonOps()):
        _, normed = ops.add_norm_for(x.clone(), None, norm, first)
        assert isinstance(normed, Rounded) == isinstance(ops, TritonOps)
        inner = ops.linear_gelu_for(first, normed, second)
        found.append(ops.linear(second, inner))
        assert found[-1].shape == x.shape
    # The interpreter cuts bfloat16 off where torch rounds it, and a code of float8 may be the next.
    assert float((found[0] - found[1]).abs().mean() / found[0].float().std()) < 0.05
