"""Grids and pixels equal the reference algorithm, written here a second time from its description.

The proof that the grids are equal for every picture up to 5000 x 5000: at a fixed height, a
decision depends on the width only through comparisons of ``|a - i/j|`` for pairs of grids and of
the area with ``0.5 * S^2 * i * j``. Both sides of such a comparison swap places only at the
midpoint of two ratios, or at an area threshold, and neighbouring widths differ in ``a`` by at
least 1/5000, far more than rounding can move. So between two such widths both algorithms are
constant, and it is enough to compare them at every one of these widths and its neighbours, for
every height. The widths at which a ratio is hit exactly are added for good measure.
"""

import itertools
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from preprocessing.grid import choose_grid
from preprocessing.media import TileSettings
from preprocessing.tiling import tile
from wire.geometry import VisionGeometry

MOST = 5000


def reference_candidates(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) in the reference's own order, which is that of a Python set."""
    grids = {
        (i, j)
        for n in range(least, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if least <= i * j <= most
    }
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def reference_grids(
    widths: NDArray[np.int64], height: int, side: int, least: int, most: int
) -> NDArray[np.int64]:
    """Columns * 1000 + rows for each width; the same float64 operations as the reference."""
    aspect, area = widths / height, widths * height
    nearest = np.full(widths.shape, np.inf)
    best = np.full(widths.shape, 1001)
    for columns, rows in reference_candidates(least, most):
        distance = np.abs(aspect - columns / rows)
        closer = distance < nearest
        tie = (distance == nearest) & (area > 0.5 * side * side * columns * rows)
        best[closer | tie] = columns * 1000 + rows
        nearest = np.minimum(nearest, distance)
    return best


def turning_widths(height: int, side: int, least: int, most: int) -> NDArray[np.int64]:
    """Every width at which the decision can change, and its neighbours."""
    grids = reference_candidates(least, most)
    ratios = sorted({columns / rows for columns, rows in grids})
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(ratios)]
    areas = sorted({0.5 * side * side * columns * rows for columns, rows in grids})
    turns = np.concatenate(
        [np.array(ratios + midpoints) * height, np.array(areas) / height, [1, MOST]]
    )
    around = np.floor(turns).astype(np.int64)[:, None] + np.arange(-1, 3)
    widths = np.unique(around)
    return widths[(widths >= 1) & (widths <= MOST)]


@pytest.mark.parametrize(
    ("side", "least", "most"),
    [(448, 1, 12), (448, 1, 6), (448, 1, 1), (448, 2, 12), (112, 1, 12), (32, 1, 4)],
)
def test_the_grid_is_the_references_for_every_picture_up_to_5000_pixels_a_side(
    side: int, least: int, most: int
) -> None:
    for height in range(1, MOST + 1):
        widths = turning_widths(height, side, least, most)
        ours = [choose_grid(width, height, side, least, most) for width in widths.tolist()]
        expected = reference_grids(widths, height, side, least, most)
        actual = np.array([columns * 1000 + rows for columns, rows in ours])
        assert np.array_equal(actual, expected), f"height {height}"


def test_between_turning_widths_nothing_changes() -> None:
    """The argument of the module's docstring, checked on all 25 million sizes."""
    every = np.arange(1, MOST + 1)
    for height in range(1, MOST + 1):
        widths = turning_widths(height, 448, 1, 12)
        last_turn = np.searchsorted(widths, every, side="right") - 1
        at_turns = reference_grids(widths, height, 448, 1, 12)
        assert np.array_equal(reference_grids(every, height, 448, 1, 12), at_turns[last_turn])


@pytest.mark.parametrize(
    ("size", "grid", "count"),
    [
        ((448, 448), (1, 1), 1),
        ((896, 448), (2, 1), 3),
        ((1280, 720), (4, 2), 9),
        ((3840, 2160), (4, 2), 9),
        ((640, 480), (4, 3), 13),
        ((4032, 3024), (4, 3), 13),
        ((1000, 1000), (3, 3), 10),
        ((633, 633), (1, 1), 1),
        ((634, 634), (2, 2), 5),
        ((950, 950), (2, 2), 5),
        ((951, 951), (3, 3), 10),
        ((2480, 3508), (2, 3), 7),
        ((100, 1200), (1, 12), 13),
        ((1, 1), (1, 1), 1),
        ((1, 5000), (1, 12), 13),
    ],
)
def test_published_examples(size: tuple[int, int], grid: tuple[int, int], count: int) -> None:
    assert choose_grid(*size, 448, 1, 12) == grid
    columns, rows = grid
    assert columns * rows + (columns * rows > 1) == count


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth areas, hard edges and noise, as a camera gives them."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack(
        [127 + 90 * np.sin(x / (7 + k) + y / (11 - k)) + 40 * ((x // 9 + y // 13) % 2 - 0.5)
         for k in range(3)],
        axis=-1,
    )  # fmt: skip
    noisy = waves + draw.normal(0, 12, waves.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8), "RGB")


def reference_tiles(
    picture: Image.Image, columns: int, rows: int, side: int, use_thumbnail: bool
) -> NDArray[np.uint8]:
    """The reference's pixel path: resize with Pillow's default filter, crop, thumbnail last."""
    resized = picture.resize((columns * side, rows * side))
    parts = []
    for index in range(columns * rows):
        left, top = (index % columns) * side, (index // columns) * side
        parts.append(resized.crop((left, top, left + side, top + side)))
    if use_thumbnail and len(parts) != 1:
        parts.append(picture.resize((side, side)))
    return np.stack([np.asarray(part).transpose(2, 0, 1) for part in parts])


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 5000), (5000, 7), (7, 5000), (2, 1), (640, 480), (448, 448), (447, 449),
     (896, 448), (1000, 1000), (1023, 767), (33, 47), (1920, 1080), (2480, 3508)],
)  # fmt: skip
def test_tiles_equal_the_reference_bit_for_bit(size: tuple[int, int]) -> None:
    picture = photograph(*size)
    tiles, count, columns, rows = tile(picture, TileSettings(448, 1, 12, True))
    expected = reference_tiles(picture, columns, rows, 448, True)
    assert (columns, rows) == choose_grid(*size, 448, 1, 12)
    assert expected.shape == (count, 3, 448, 448)
    assert tiles == expected.tobytes()


@pytest.mark.parametrize("use_thumbnail", [True, False])
@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 6), (2, 12), (4, 9)])
def test_other_settings_give_the_references_tiles_too(
    least: int, most: int, use_thumbnail: bool
) -> None:
    sizes = random.Random(least * 100 + most)
    for seed in range(8):
        picture = photograph(sizes.randint(1, 600), sizes.randint(1, 600), seed)
        tiles, count, columns, rows = tile(picture, TileSettings(56, least, most, use_thumbnail))
        expected = reference_tiles(picture, columns, rows, 56, use_thumbnail)
        assert least <= columns * rows <= most
        assert (count, tiles) == (len(expected), expected.tobytes())


def test_a_part_can_lower_the_maximum_but_not_raise_it() -> None:
    geometry = VisionGeometry(tile_size=448, tokens_per_tile=256, min_tiles=2, max_tiles=6)
    assert TileSettings.of(geometry) == TileSettings(448, 2, 6, True)
    assert TileSettings.of(geometry, 12).max_tiles == 6
    assert TileSettings.of(geometry, 4).max_tiles == 4
    assert TileSettings.of(geometry, 1) == TileSettings(448, 1, 1, True)
    assert TileSettings.of(geometry, 0).max_tiles == 1


def test_every_setting_that_changes_tiles_changes_the_digest() -> None:
    variants = [
        TileSettings(448, 1, 12, True),
        TileSettings(112, 1, 12, True),
        TileSettings(448, 2, 12, True),
        TileSettings(448, 1, 6, True),
        TileSettings(448, 1, 12, False),
    ]
    assert len({settings.digest_bytes for settings in variants}) == len(variants)
