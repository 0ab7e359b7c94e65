"""What a person sees in a picture is what the model gets, and no file gets more than a refusal."""

import contextlib
import io
import random
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin

from preprocessing import images, media
from preprocessing.images import FORMATS, Unreadable, look_picture, open_picture
from preprocessing.media import REASONS, PictureFacts, Reason
from tests.pictures import encode, png, png_chunk, promise, sample, stored, turned

LIMIT = 178_956_970

# An asymmetric picture: no turn or flip of it equals another one.
PIXELS = np.random.default_rng(5).integers(0, 256, (5, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS, "RGB")


def pixels(encoded: bytes, limit: int = LIMIT) -> NDArray[np.uint8]:
    picture = open_picture(encoded, limit)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def refusal(encoded: bytes, limit: int = LIMIT) -> Reason:
    with pytest.raises(Unreadable) as refused:
        open_picture(encoded, limit)
    return refused.value.reason


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}),
     ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_deflate"})],
)  # fmt: skip
def test_lossless_formats_give_the_same_pixels(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(pixels(encode(PICTURE, kind, **options)), PIXELS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_jpeg_gives_what_pillow_decodes(options: dict[str, Any]) -> None:
    encoded = encode(PICTURE, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(pixels(encoded), expected)


def test_a_jpeg_with_more_pictures_behind_it_gives_the_first() -> None:
    plain = Image.new("RGB", (16, 16), (200, 30, 40))
    encoded = encode(plain, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert np.abs(pixels(encoded).astype(int) - (200, 30, 40)).max() < 6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    first = Image.new("RGB", (6, 4), (255, 0, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("blue", "lime")]
    encoded = encode(first, kind, save_all=True, append_images=frames, **options)
    assert np.array_equal(pixels(encoded), np.asarray(first))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    beside = encode(stored(PICTURE, orientation), kind, exif=turned(orientation), **options)
    assert np.array_equal(pixels(beside), PIXELS)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_photograph_comes_out_upright(orientation: int) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:16, :16] = (250, 250, 250)  # a bright corner, top left
    beside = stored(Image.fromarray(upright, "RGB"), orientation)
    seen = pixels(encode(beside, "JPEG", exif=turned(orientation)))
    assert seen.shape == upright.shape
    assert seen[:12, :12].mean() > 200
    assert seen[24:, 24:].mean() < 20


@pytest.mark.parametrize(
    "tag", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40]
)
def test_a_damaged_orientation_tag_counts_as_upright(tag: bytes) -> None:
    encoded = encode(PICTURE, "JPEG")
    marker = b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag
    assert pixels(encoded[:2] + marker + encoded[2:]).shape == PIXELS.shape


def test_unknown_orientations_change_nothing() -> None:
    for value in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = value
        assert np.array_equal(pixels(encode(PICTURE, exif=exif)), PIXELS)


def test_half_transparent_red_is_pink() -> None:
    encoded = encode(Image.new("RGBA", (3, 3), (255, 0, 0, 128)))
    assert pixels(encoded)[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_invisible_pixels_are_white_whatever_colour_hides_there(kind: str) -> None:
    hidden = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    hidden.putpixel((1, 1), (10, 20, 30, 255))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    seen = pixels(encode(hidden, kind, **options))
    assert seen[1, 1].tolist() == [10, 20, 30]
    assert seen[0].tolist() == [[255, 255, 255]] * 4


def test_grey_with_alpha_is_laid_on_white() -> None:
    picture = Image.new("LA", (2, 1), (0, 0))
    picture.putpixel((1, 0), (40, 255))
    assert pixels(encode(picture))[0].tolist() == [[255] * 3, [40] * 3]


def palette_picture() -> Image.Image:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    return picture


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind: str) -> None:
    encoded = encode(palette_picture(), kind, transparency=1)
    assert pixels(encoded)[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def test_palette_entries_with_their_own_alpha_are_mixed_with_white() -> None:
    encoded = encode(palette_picture(), transparency=b"\xff\x00\x80")
    assert pixels(encoded)[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 255]]


def test_a_palette_without_transparency_gives_its_colours() -> None:
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pixels(encode(palette_picture()))[0].tolist() == expected


def test_a_transparent_colour_is_white() -> None:
    rgb = png(2, 1, 8, 2, b"\0\x0a\x14\x1e\x01\x02\x03", png_chunk(b"tRNS", b"\0\x0a\0\x14\0\x1e"))
    assert pixels(rgb)[0].tolist() == [[255] * 3, [1, 2, 3]]
    grey = png(2, 1, 8, 0, b"\0\x0a\x50", png_chunk(b"tRNS", b"\0\x0a"))
    assert pixels(grey)[0].tolist() == [[255] * 3, [80] * 3]


def test_a_transparent_16_bit_grey_is_white() -> None:
    rows = b"\0" + struct.pack(">3H", 1000, 1001, 65535)
    encoded = png(3, 1, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels(encoded)[0].tolist() == [[255] * 3, [4] * 3, [255] * 3]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 256, 257, 32768, 65406, 65407, 65535]], np.uint16)
    seen = pixels(encode(Image.fromarray(values)))[0, :, 0]
    assert seen.tolist() == np.round(values[0] / 257).astype(int).tolist()


def test_16_bit_colour_keeps_its_high_byte() -> None:
    encoded = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x80FF, 0, 0x0100))
    assert pixels(encoded)[0].tolist() == [[0, 0x12, 0xFF], [0x80, 0, 1]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([7.0, 7.0, 7.0], [255, 255, 255]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_float_grey_is_scaled_to_its_range(values: list[float], expected: list[int]) -> None:
    picture = Image.fromarray(np.array([values], np.float32), "F")
    assert pixels(encode(picture, "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_float_grey_without_a_range_is_refused(bad: float) -> None:
    picture = Image.fromarray(np.array([[bad, 0.5]], np.float32), "F")
    assert refusal(encode(picture, "TIFF")) is Reason.BROKEN


def test_32_bit_grey_is_scaled_to_its_range() -> None:
    narrow = Image.fromarray(np.array([[0, 257, 65535]], np.int32), "I")
    assert pixels(encode(narrow, "TIFF"))[0, :, 0].tolist() == [0, 1, 255]
    wide = Image.fromarray(np.array([[0, 1 << 20, 1 << 21]], np.int32), "I")
    assert pixels(encode(wide, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_black_and_white_become_rgb(mode: str) -> None:
    picture = Image.linear_gradient("L").convert(mode)
    seen = pixels(encode(picture))
    assert np.array_equal(seen, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")])
def test_other_colour_spaces_keep_their_colour(mode: str, kind: str) -> None:
    encoded = encode(Image.new("RGB", (16, 16), (200, 60, 20)).convert(mode), kind)
    assert np.abs(pixels(encoded).astype(int) - (200, 60, 20)).max() <= 6


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 7)])
def test_extreme_shapes_are_pictures(size: tuple[int, int]) -> None:
    assert open_picture(encode(Image.new("RGB", size)), LIMIT).size == size


# WebP and AVIF know no larger ones.
SIDES = {"WEBP": 16_000, "AVIF": 16_000}
# A Photo CD is always 768 x 512; an icon of Mac OS has the size that its kind says.
FIXED = {"PCD", "ICNS"}


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"PCD"}))
def test_a_bomb_is_refused_from_its_header(kind: str) -> None:
    # There are no pixels in the file: a decoder that looked for them would call it damaged.
    side = SIDES.get(kind, 30_000)
    assert refusal(promise(kind, side, side)) is Reason.TOO_LARGE


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - FIXED))
def test_looking_at_a_bomb_tells_its_size_or_refuses_it(kind: str) -> None:
    side = SIDES.get(kind, 30_000)
    bomb = promise(kind, side, side)
    facts = look_picture(bomb, side * side)
    assert (facts.format.upper(), facts.width, facts.height) == (kind, side, side)
    with pytest.raises(Unreadable) as refused:
        look_picture(bomb, side * side - 1)
    assert refused.value.reason is Reason.TOO_LARGE


@pytest.mark.parametrize("kind", FORMATS)
def test_looking_decodes_no_pixel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = sample(kind)
    seen = open_picture(encoded, LIMIT)

    def decode(*_: object) -> None:
        pytest.fail("a decoder was asked for")  # nothing but pytest catches that

    monkeypatch.setattr(Image, "_getdecoder", decode)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert look_picture(encoded, LIMIT) == PictureFacts(FACTS.get(kind, kind), *seen.size)


# Pillow's own spelling.
FACTS = {"XVTHUMB": "XVThumb"}


def test_a_gif_whose_frame_outgrows_its_screen_is_refused() -> None:
    bomb = bytearray(encode(Image.new("P", (4, 4)), "GIF"))
    frame = bomb.index(b",", 13)
    bomb[frame + 5 : frame + 9] = struct.pack("<HH", 65_535, 65_535)
    assert refusal(bytes(bomb)) is Reason.TOO_LARGE


@pytest.mark.parametrize("kind", FORMATS)
def test_the_pixel_limit_is_exact(kind: str) -> None:
    encoded = sample(kind)
    width, height = open_picture(encoded, LIMIT).size
    assert open_picture(encoded, width * height).size == (width, height)
    assert refusal(encoded, width * height - 1) is Reason.TOO_LARGE


def test_the_limit_may_be_higher_than_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_picture(encode(Image.new("RGB", (40, 25))), 1000).size == (40, 25)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"PCD", "WEBP", "JXL", "PCX", "DCX"}))
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(kind: str, size: tuple[int, int]) -> None:
    assert refusal(promise(kind, *size)) in {Reason.EMPTY, Reason.BROKEN, Reason.UNSUPPORTED}


def test_a_giant_text_chunk_is_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (70 << 20), zip=True)
    assert refusal(encode(PICTURE, pnginfo=text)) in {Reason.BROKEN, Reason.UNSUPPORTED}


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    encoded = sample(kind)
    assert refusal(encoded[: int(len(encoded) * share)]) in {Reason.BROKEN, Reason.UNSUPPORTED}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_a_file_without_its_last_tenth_is_refused(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise, "RGB"), kind)
    share = 0.9
    assert refusal(encoded[: int(len(encoded) * share)]) in {Reason.BROKEN, Reason.UNSUPPORTED}


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bytes_give_a_picture_or_a_refusal_and_nothing_else(kind: str) -> None:
    draw = random.Random(3)
    encoded = sample(kind)
    for _ in range(40):
        damaged = bytearray(encoded)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(Unreadable):
            assert open_picture(damaged, 1_000_000).mode == "RGB"


@pytest.mark.parametrize(
    "encoded",
    [b"", b"\0", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xd7\xcd\xc6\x9a" + bytes(80),
     b"BUFR" + bytes(80), b"GRIB\0\0\0\1" + bytes(80), b"\x89HDF\r\n\x1a\n" + bytes(80),
     b"\0\0\1\xb3" + bytes(80), b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
     bytes(range(256)) * 40],
)  # fmt: skip
def test_what_is_no_picture_is_unsupported(encoded: bytes) -> None:
    assert refusal(encoded) is Reason.UNSUPPORTED


def test_heic_is_refused_by_name_where_no_thread_can_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nameless = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    assert refusal(nameless) is Reason.BROKEN
    monkeypatch.setattr(images, "FORMATS", list(FORMATS))
    images.do_without_threads()
    assert refusal(nameless) is refusal(sample("HEIF")) is Reason.NO_HEIC
    with pytest.raises(Unreadable) as refused:
        look_picture(sample("HEIF"), LIMIT)
    assert refused.value.reason is Reason.NO_HEIC


def test_jpeg_xl_is_refused_by_name_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "FORMATS", tuple(set(FORMATS) - {"JXL"}))
    assert refusal(promise("JXL", 9, 9)) is Reason.NO_JPEG_XL
    with pytest.raises(Unreadable) as refused:
        look_picture(promise("JXL", 9, 9), LIMIT)
    assert refused.value.reason is Reason.NO_JPEG_XL


def test_every_reason_has_a_sentence() -> None:
    assert set(REASONS) == set(Reason)


def test_the_sentence_names_every_format() -> None:
    told = str(media.refusal(Reason.UNSUPPORTED, "image", "image")).upper().replace(" ", "")
    missing = {kind for kind in FORMATS if kind not in told}
    assert missing == {"JXL"} & set(FORMATS)
