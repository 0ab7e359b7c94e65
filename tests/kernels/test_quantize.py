"""Rows in float8 by the kernel are torch's, to the bit."""

import pytest
import torch
from torch import Tensor

from model.quantize import to_fp8 as reference
from model.triton.quantize import to_fp8

LEAST = 1e-12


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.triton.missing", lambda device: "not to be used")


def assert_equal(rows: Tensor) -> None:
    (found, scale), (expected, expected_scale) = to_fp8(rows, LEAST), reference(rows)
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
    found, _ = to_fp8(row, LEAST)
    assert found[0, :127].view(torch.uint8).tolist() == list(range(127))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at infinity times 0
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_one_row(bad: float, device: torch.device) -> None:
    rows = torch.ones(3, 40, device=device)
    rows[1, 7] = bad
    _, scale = to_fp8(rows, LEAST)
    assert scale.isfinite()[:, 0].tolist() == [True, False, True]
