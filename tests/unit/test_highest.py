"""The likeliest token is the one that torch finds."""

import pytest
import torch

from engine.sampling.sampler import highest

SIZES = (1, 7, 1024, 151_674)


def check(logits: torch.Tensor) -> None:
    best, places = highest(logits)
    expected = logits.argmax(-1)
    assert torch.equal(places, expected)
    assert torch.equal(
        best.nan_to_num(7.5), logits.gather(-1, expected[:, None])[:, 0].nan_to_num(7.5)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_highest_is_found_and_of_several_the_first(rows: int, size: int) -> None:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    check(logits)
    check(logits.round())  # many are as high
    check(logits.sign() * 0)  # and 0 is not above -0


@pytest.mark.parametrize("size", SIZES)
def test_numbers_that_are_not_finite_have_their_order(size: int) -> None:
    logits = torch.full((2, size), -torch.inf)
    check(logits)
    logits[1, size // 2] = torch.inf
    check(logits)
    logits[0, size - 1] = torch.nan
    logits[1, [size // 3, size // 2]] = torch.nan
    check(logits)


def test_rows_may_be_many_and_lie_apart() -> None:
    wide = torch.randn(300, 5000, generator=torch.Generator().manual_seed(1))
    check(wide)
    check(wide[:, 10:4000])
    check(wide[:, ::3])
