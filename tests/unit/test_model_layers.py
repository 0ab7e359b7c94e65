"""The pieces of the model that have a formula of their own."""

import math

import pytest
import torch

from model.projector import pixel_shuffle
from model.rotary import angles, inverse_frequencies, rotate


def test_pixel_shuffle_joins_each_square_row_by_row() -> None:
    side, size = 8, 3
    patches = torch.arange(2 * side * side * size).view(2, side * side, size).float()
    tokens = pixel_shuffle(patches, 2, "v2")
    assert tokens.shape == (2, 16, 12)
    for row in range(4):
        for column in range(4):
            square = [
                patches[:, (2 * row + r) * side + 2 * column + c] for r in (0, 1) for c in (0, 1)
            ]
            assert torch.equal(tokens[:, row * 4 + column], torch.cat(square, dim=-1))


def test_the_first_version_puts_tokens_in_column_order() -> None:
    patches = torch.randn(1, 64, 5)
    first, second = pixel_shuffle(patches, 2, "v1"), pixel_shuffle(patches, 2, "v2")
    swapped = second.view(1, 4, 4, 20).transpose(1, 2).reshape(1, 16, 20)
    assert torch.equal(first, swapped)


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    frequencies = inverse_frequencies(8, 10_000.0, torch.device("cpu"))
    heads = torch.randn(2, 3, 8)
    turned = rotate(heads, angles(torch.tensor([0.0, 2.5]), frequencies))
    assert torch.equal(turned[0], heads[0])
    for pair in range(4):
        angle = 2.5 * 10_000.0 ** (-2 * pair / 8)
        real, imaginary = heads[1, :, pair], heads[1, :, pair + 4]
        expected = real * math.cos(angle) - imaginary * math.sin(angle)
        torch.testing.assert_close(turned[1, :, pair], expected)
        expected = imaginary * math.cos(angle) + real * math.sin(angle)
        torch.testing.assert_close(turned[1, :, pair + 4], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_depends_on_distance_alone_however_far(dtype: torch.dtype) -> None:
    """Positions beyond 256 cannot be told apart in bf16, so angles must not be computed in it."""
    frequencies = inverse_frequencies(64, 1e6, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 64).to(dtype)

    def score(at: int) -> float:
        q = rotate(query, angles(torch.tensor([at]), frequencies))
        k = rotate(key, angles(torch.tensor([at - 1]), frequencies))
        return float((q.float() * k.float()).sum())

    assert score(32_000) == pytest.approx(score(1), abs=2e-2 if dtype == torch.float32 else 0.3)
