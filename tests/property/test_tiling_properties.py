"""What holds for the tiles of any picture, whatever its size and the settings."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.grid import choose_grid
from preprocessing.media import TileSettings
from preprocessing.tiling import tile

SIDES = st.integers(1, 100_000)
BOUNDS = st.tuples(st.integers(1, 16), st.integers(1, 16)).map(sorted)


@given(width=SIDES, height=SIDES, side=st.integers(1, 1000), bounds=BOUNDS)
def test_a_grid_has_an_allowed_number_of_tiles(
    width: int, height: int, side: int, bounds: list[int]
) -> None:
    least, most = bounds
    columns, rows = choose_grid(width, height, side, least, most)
    assert least <= columns * rows <= most


@given(width=SIDES, height=SIDES)
def test_no_other_grid_is_nearer(width: int, height: int) -> None:
    columns, rows = choose_grid(width, height, 448, 1, 12)
    chosen = abs(width / height - columns / rows)
    assert all(
        chosen <= abs(width / height - i / j)
        for i in range(1, 13)
        for j in range(1, 13)
        if i * j <= 12
    )


@settings(max_examples=50)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.integers(1, 24),
    most=st.integers(1, 9),
    use_thumbnail=st.booleans(),
    noise=st.binary(min_size=3, max_size=3),
)
def test_tiles_put_together_are_the_stretched_picture(
    width: int, height: int, side: int, most: int, use_thumbnail: bool, noise: bytes
) -> None:
    shade = Image.radial_gradient("L").resize((width, height))
    picture = Image.merge("RGB", [shade.point(lambda v, by=by: (v * by) % 256) for by in noise])
    data, count, columns, rows = tile(picture, TileSettings(side, 1, most, use_thumbnail))
    tiles = np.frombuffer(data, np.uint8).reshape(count, 3, side, side)
    grid = tiles[: columns * rows].reshape(rows, columns, 3, side, side)
    mosaic = grid.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    stretched = picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    assert np.array_equal(mosaic, np.asarray(stretched))
    assert count == columns * rows + (use_thumbnail and columns * rows > 1)
