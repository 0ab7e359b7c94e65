"""What ``image_decoding: fast`` changes: nothing but large JPEGs, and those by a stated bound."""

import io
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from preprocessing.images import FORMATS, look_picture, open_picture
from preprocessing.media import Tiled, TileJob, TileSettings, Treatment
from preprocessing.worker import answer
from tests.pictures import encode, sample, stored, turned

LIMIT = 100_000_000


def tiles(
    encoded: bytes, *, fast: bool, most: int = 4, treatment: Treatment = "normalized"
) -> tuple[Tiled, NDArray[np.uint8]]:
    settings = TileSettings(112, 1, most, True, treatment, fast)
    message, buffers = answer(
        TileJob(settings=settings, max_pixels=LIMIT, seconds=60), bytearray(encoded)
    )
    assert isinstance(message, Tiled)
    message = msgspec.structs.replace(message, decode_seconds=0, tile_seconds=0)
    return message, np.frombuffer(buffers[0], np.uint8)


def page(width: int, height: int) -> Image.Image:
    """Small black letters on white: nothing has harder edges."""
    paper = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(18)
    for line in range(0, height, 22):
        pen.text((line % 13, line), "The quick brown fox jumps over it. " * 9, (0, 0, 0), font)
    return paper


def noise(width: int, height: int) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((width, height), 120)] * 3)


def soft(width: int, height: int) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def camera(width: int, height: int) -> Image.Image:
    """Soft, with a sensor's noise."""
    return Image.blend(soft(width, height), noise(width, height), 0.1)


# (mean, largest) difference in levels of 255, at twice the pixels of the grid and more.
BOUNDS: list[tuple[Callable[[int, int], Image.Image], float, int]] = [
    (soft, 0.5, 3), (camera, 1.0, 8), (page, 4.0, 48), (noise, 5.0, 40)
]  # fmt: skip


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize(("make", "mean", "largest"), BOUNDS)
def test_a_large_jpeg_changes_within_the_stated_bound(
    make: Callable[[int, int], Image.Image], mean: float, largest: int, scale: int, subsampling: int
) -> None:
    # Twice a grid of 2 x 2 tiles of 112 pixels at the scale, and not a pixel more.
    side = 112 * (1 if scale == 8 else 2) * 2 * scale
    encoded = encode(make(side, side), "JPEG", quality=90, subsampling=subsampling)
    most = 1 if scale == 8 else 4
    message, exact = tiles(encoded, fast=False, most=most)
    quick, fast = tiles(encoded, fast=True, most=most)
    assert quick == message
    assert (quick.width, quick.height) == (side, side)
    difference = np.abs(exact.astype(int) - fast)
    assert 0 < difference.mean() <= mean
    assert difference.max() <= largest


def decoded_size(encoded: bytes, enough: tuple[int, int]) -> tuple[int, int]:
    return open_picture(encoded, LIMIT, "normalized", enough).size


@pytest.mark.parametrize(
    ("size", "enough", "decoded"),
    [
        ((1600, 800), (800, 400), (800, 400)),
        ((1600, 800), (801, 400), (1600, 800)),
        ((1600, 800), (800, 401), (1600, 800)),
        ((1600, 800), (200, 100), (200, 100)),
        ((1600, 800), (201, 100), (400, 200)),
        ((1602, 802), (200, 100), (801, 401)),
        ((1601, 800), (200, 100), (1601, 800)),
    ],
)
def test_no_more_is_left_out_than_leaves_enough_and_no_pixel_is_divided(
    size: tuple[int, int], enough: tuple[int, int], decoded: tuple[int, int]
) -> None:
    assert decoded_size(encode(Image.new("RGB", size), "JPEG"), enough) == decoded


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_as_large_as_an_upright_one(orientation: int) -> None:
    upright = Image.new("RGB", (1600, 800))
    upright.paste("white", (0, 0, 400, 200))
    beside = encode(stored(upright, orientation), "JPEG", exif=turned(orientation))
    shown = open_picture(beside, LIMIT, "normalized", (400, 200))
    assert shown.size == (400, 200)
    assert np.asarray(shown)[:45, :90].min() > 200
    assert np.asarray(shown)[60:, 120:].max() < 50


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"JPEG"}))
def test_nothing_else_changes(kind: str) -> None:
    encoded = sample(kind)
    width, height = open_picture(encoded, LIMIT).size
    assert decoded_size(encoded, (1, 1)) == (width, height)
    message, exact = tiles(encoded, fast=False, most=1)
    quick, fast = tiles(encoded, fast=True, most=1)
    assert quick == message
    assert np.array_equal(exact, fast)


def test_a_small_jpeg_does_not_change() -> None:
    encoded = encode(camera(440, 440), "JPEG")
    assert look_picture(encoded, LIMIT).width < 4 * 112
    exact, fast = (tiles(encoded, fast=fast)[1] for fast in (False, True))
    assert np.array_equal(exact, fast)


def test_the_file_decides_and_not_pillows_draft() -> None:
    """The mode stays: a grey or CMYK JPEG is converted as at its full size."""
    for mode in ("L", "CMYK"):
        encoded = encode(Image.new(mode, (800, 800), 90 if mode == "L" else (9, 90, 9, 0)), "JPEG")
        reduced = open_picture(encoded, LIMIT, "normalized", (100, 100))
        whole = Image.open(io.BytesIO(encoded)).convert("RGB")
        assert reduced.getpixel((50, 50)) == whole.getpixel((400, 400))
