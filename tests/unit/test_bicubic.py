"""The compiled resize gives Pillow's bytes, whatever the picture; what it does not do, Pillow does.

Pillow is the oracle. The kernels are there only where a compiler was when this was installed.
"""

import ctypes
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing import bicubic
from wire import native

KERNELS = bicubic.kernels()
LIBRARY = native.load(bicubic.__file__, "_resize", bicubic.VERSION)

compiled = pytest.mark.skipif(not KERNELS, reason="installed without a C compiler")


@compiled
def test_a_library_from_other_sources_is_as_good_as_none() -> None:
    assert native.load(bicubic.__file__, "_resize", bicubic.VERSION) is not None
    assert native.load(bicubic.__file__, "_resize", bicubic.VERSION + 1) is None


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Any bytes, or black and white, which overshoots most, or soft."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 1:
        pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))
    elif seed % 3 == 2:
        pixels = 120 + pixels // 32
    return Image.fromarray(pixels)


def assert_pillows(picture: Image.Image, side: int, columns: int, rows: int, whole: bool) -> None:
    expected = bicubic.with_pillow(picture, side, columns, rows, whole)
    for number, kernel in enumerate(KERNELS):
        tiles = kernel.tiles(picture, side, columns, rows, whole)
        assert tiles == expected, (picture.size, side, columns, rows, number)


@compiled
def test_a_thousand_sizes_up_and_down() -> None:
    choose = random.Random(1)
    for seed in range(1000):
        most = choose.choice((3, 20, 70, 300))
        width, height = choose.randint(1, most), choose.randint(1, choose.choice((3, 70, 300)))
        side = choose.choice((1, 2, 7, 14, 16, 28, 33, 48))
        grid = choose.randint(1, 4), choose.randint(1, 3)
        assert_pillows(noise(width, height, seed), side, *grid, choose.random() < 0.5)


@compiled
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (3, 1), (1, 5000), (5000, 1), (7, 5000), (5000, 7), (4097, 33), (65536, 2)],
)
@pytest.mark.parametrize(("side", "columns", "rows"), [(16, 1, 1), (28, 3, 2), (112, 1, 2)])
def test_strips(size: tuple[int, int], side: int, columns: int, rows: int) -> None:
    assert_pillows(noise(*size, 0), side, columns, rows, True)


@compiled
@pytest.mark.parametrize("size", [(1080, 2400), (640, 480), (1152, 864)])
@pytest.mark.parametrize("grid", [(4, 3), (2, 4)])
def test_tiles_of_the_models_own_side(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert_pillows(noise(*size, 0), 448, *grid, True)


@compiled
@pytest.mark.parametrize("taller", range(-2, 4))
def test_pillow_turns_to_columns_first_where_we_do(taller: int) -> None:
    for narrower in (-9, 0, 1, 25):
        width, height = 60 + narrower, 60 + 2 * max(0, narrower) + taller
        assert_pillows(noise(width, height, 0), 20, 3, 3, False)


@compiled
@pytest.mark.parametrize("size", [(65537, 1), (1, 65537)])
def test_pictures_beyond_its_bounds_are_left_to_pillow(size: tuple[int, int]) -> None:
    picture = noise(*size, 0)
    assert all(kernel.tiles(picture, 16, 1, 1, False) is None for kernel in KERNELS)
    assert bicubic.tiles(picture, 16, 1, 1, False) == bicubic.with_pillow(picture, 16, 1, 1, False)


@compiled
def test_sizes_that_would_overflow_are_refused_before_a_byte_is_touched() -> None:
    assert LIBRARY is not None
    huge = 2**31 - 1
    good = [8, 8, 4, 2, 2, 1, LIBRARY.resize_best_kernel()]
    for place in range(5):
        for bad in (0, -1, huge, -huge):
            sizes = [*good[:place], bad, *good[place + 1 :]]
            assert LIBRARY.resize_tiles(None, *map(ctypes.c_int, sizes), None) == -2
    for sizes in ([8, 8, 40_000, 2, 1, 0, good[-1]], [8, 8, 40_000, 1, 2, 0, good[-1]]):
        assert LIBRARY.resize_tiles(None, *map(ctypes.c_int, sizes), None) == -2
    for bad in (-1, LIBRARY.resize_kernel_count(), huge):
        assert LIBRARY.resize_tiles(None, *map(ctypes.c_int, [*good[:-1], bad]), None) == -2


@compiled
def test_a_picture_in_several_pieces_is_left_to_pillow() -> None:
    core = Image.core
    whole = core.get_block_size()
    core.set_block_size(4096)
    try:
        picture = noise(100, 100, 0).copy()
    finally:
        core.set_block_size(whole)
    assert KERNELS[0].tiles(picture, 16, 2, 2, True) is None
    assert bicubic.tiles(picture, 16, 2, 2, True) == bicubic.with_pillow(picture, 16, 2, 2, True)


@compiled
def test_a_kernel_that_differs_from_this_pillow_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert bicubic.choose() is not None

    resize = Image.Image.resize

    def rows_first(self: Image.Image, size: tuple[int, int], how: int) -> Image.Image:
        """As Pillow 12 does always."""
        return resize(resize(self, (size[0], self.height), how), size, how)

    monkeypatch.setattr(Image.Image, "resize", rows_first)
    assert bicubic.choose() is None


def test_without_a_compiled_library_pillow_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bicubic, "__file__", str(tmp_path / "bicubic.py"))
    assert bicubic.kernels() == []
    assert bicubic.choose() is None
    picture = noise(50, 40, 0)
    monkeypatch.setattr(bicubic, "_kernel", None)
    assert bicubic.tiles(picture, 16, 2, 2, True) == bicubic.with_pillow(picture, 16, 2, 2, True)
