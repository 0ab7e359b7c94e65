"""What a person sees, and what the model's own code sees: the two treatments of a picture."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from preprocessing.images import FORMATS, look_picture, open_picture
from preprocessing.media import Treatment
from tests.pictures import encode, picture, png, png_chunk, sample, stored, turned

LIMIT = 10_000_000
TREATMENTS: tuple[Treatment, ...] = ("normalized", "reference")
WHITE = [255, 255, 255]
PIXELS = np.random.default_rng(5).integers(0, 256, (5, 8, 3), dtype=np.uint8)


def pixels(encoded: bytes, treatment: Treatment = "normalized") -> NDArray[np.uint8]:
    return np.asarray(open_picture(encoded, LIMIT, treatment))


def plain(encoded: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def half_clear() -> Image.Image:
    """Red on the left; on the right nothing, where green hides."""
    shown = Image.new("RGBA", (16, 16), (0, 200, 0, 0))
    shown.paste((200, 0, 0, 255), (0, 0, 8, 16))
    return shown


ODD: dict[str, bytes] = {
    "hidden colours": encode(half_clear()),
    "grey with alpha": encode(half_clear().convert("LA")),
    "16-bit grey": encode(Image.fromarray(np.arange(0, 60_000, 500, np.uint16).reshape(10, 12))),
    "float": encode(Image.fromarray(np.array([[0.0, 0.5, np.nan, 300]], np.float32)), "TIFF"),
    "palette": encode(picture().quantize(16)),
    "CMYK": encode(picture().convert("CMYK"), "JPEG"),
    "Lab": encode(picture().convert("LAB"), "TIFF"),
    "black and white": encode(picture().convert("1")),
    **{f"EXIF {value}": encode(picture(), "JPEG", exif=turned(value)) for value in range(1, 9)},
    **{f"TIFF {value}": encode(picture(), "TIFF", exif=turned(value)) for value in (3, 6)},
}


@pytest.mark.parametrize("name", [*FORMATS, *ODD])
def test_the_reference_treatment_is_pillows_plain_conversion(name: str) -> None:
    encoded = sample(name) if name in FORMATS else ODD[name]
    assert np.array_equal(pixels(encoded, "reference"), plain(encoded))


@pytest.mark.parametrize("treatment", ["normalized", "reference"])
@pytest.mark.parametrize("name", ODD)
def test_looking_tells_the_size_that_will_be_shown(name: str, treatment: Treatment) -> None:
    if name == "float" and treatment == "normalized":
        return  # it has no grey, which only its pixels tell
    facts = look_picture(ODD[name], LIMIT, treatment)
    shown = pixels(ODD[name], treatment)
    assert (facts.height, facts.width) == shown.shape[:2]
    assert facts.orientation == (int(name[-1]) if name[-1].isdigit() else 1)


def test_the_treatments_differ_where_they_should() -> None:
    hidden = ODD["hidden colours"]
    assert pixels(hidden)[0, 12].tolist() == WHITE
    assert pixels(hidden, "reference")[0, 12].tolist() == [0, 200, 0]
    assert pixels(ODD["EXIF 6"]).shape[:2] == pixels(ODD["EXIF 6"], "reference").shape[1::-1]
    assert pixels(ODD["16-bit grey"]).max() < 240
    assert (pixels(ODD["16-bit grey"], "reference") == 255).sum() > 300


LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}, "ICNS": {}, "ICO": {},
    "TGA": {}, "JPEG2000": {}, "DDS": {}, "SGI": {}, "QOI": {}, "AVIF": {"quality": 100},
    "HEIF": {"quality": 100},
}  # fmt: skip


@pytest.mark.parametrize("kind", [*LOSSLESS, *({"JXL"} & set(FORMATS))])
def test_alpha_is_laid_on_white_in_every_format_that_has_it(kind: str) -> None:
    size = (1024, 1024) if kind == "ICNS" else (16, 16)
    shown = half_clear().resize(size, Image.Resampling.NEAREST)
    options = LOSSLESS.get(kind, {"lossless": True})
    seen = pixels(encode(shown, kind, **options)).astype(int)
    middle, quarter = seen.shape[0] // 2, seen.shape[1] // 4
    assert np.abs(seen[middle, quarter] - (200, 0, 0)).max() <= 2
    assert np.abs(seen[middle, 3 * quarter] - WHITE).max() <= 2


def test_premultiplied_alpha_is_not_darkened_twice() -> None:
    encoded = bytearray(encode(Image.new("RGBA", (2, 2), (100, 0, 0, 128)), "TIFF"))
    tag = struct.pack("<HHI", 338, 3, 1) + struct.pack("<HH", 2, 0)  # ExtraSamples
    assert tag in encoded
    premultiplied = encoded.replace(tag, tag[:8] + struct.pack("<HH", 1, 0))
    # 100 of 128 is 199; half of that and half of the white page.
    assert np.abs(pixels(bytes(premultiplied))[0, 0].astype(int) - (227, 127, 127)).max() <= 1


@pytest.mark.parametrize("bits", [1, 4, 8, 24, 32])
def test_the_mask_of_an_icon_is_white(bits: int) -> None:
    mode = {1: "1", 4: "P", 8: "P", 24: "RGB", 32: "RGBA"}[bits]
    black = Image.new(mode, (32, 32))
    if bits == 4:
        black = Image.new("P", (32, 32))
    icon = bytearray(encode(black, "ICO", bitmap_format="bmp", sizes=[(32, 32)]))
    if bits != 32:
        icon[-128:] = b"\xff\xff\0\0" * 32  # the left half is clear
        seen = pixels(bytes(icon))
        assert seen[5, 5].tolist() == WHITE
        assert seen[5, 25].tolist() == [0, 0, 0]
    else:
        assert pixels(bytes(icon))[5, 5].tolist() == WHITE


def test_an_icon_of_a_bitmap_has_the_height_without_its_mask() -> None:
    icon = encode(picture(32, 20), "ICO", bitmap_format="bmp", sizes=[(32, 20)])
    facts = look_picture(icon, LIMIT)
    assert (facts.height, facts.width) == pixels(icon).shape[:2] == (20, 32)


def test_a_cursor_of_two_colours_shows_its_mask() -> None:
    info = struct.pack("<IiiHHIIiiII", 40, 32, 64, 1, 1, 0, 0, 0, 0, 2, 0)
    colours = b"\0\0\0\0\xff\xff\xff\0"
    inside = b"\0" * 128  # black
    mask = b"\xff\xff\0\0" * 32  # set: the screen shines through
    folder = struct.pack("<BBBBHHII", 32, 32, 2, 0, 0, 0, 304, 22)
    seen = pixels(b"\0\0\2\0\1\0" + folder + info + colours + inside + mask)
    assert seen.shape == (32, 32, 3)
    assert seen[5, 5].tolist() == WHITE
    assert seen[5, 25].tolist() == [0, 0, 0]


def test_a_transparent_16_bit_colour_is_told_from_its_neighbours() -> None:
    clear = (0x1234, 0, 0xFFFF)
    rows = b"\0" + struct.pack(">9H", *clear, 0x1200, 0, 0xFFFF, 0x1234, 1, 0xFFFF)
    encoded = png(3, 1, 16, 2, rows, png_chunk(b"tRNS", struct.pack(">3H", *clear)))
    assert pixels(encoded)[0].tolist() == [WHITE, [0x12, 0, 0xFF], [0x12, 0, 0xFF]]
    assert np.array_equal(pixels(encoded, "reference"), plain(encoded))


def test_a_transparent_bit_is_white() -> None:
    encoded = png(8, 1, 1, 0, b"\0\x0f", png_chunk(b"tRNS", b"\0\0"))
    assert pixels(encoded)[0].tolist() == [WHITE] * 8
    assert pixels(encoded, "reference")[0].tolist() == [[0, 0, 0]] * 4 + [WHITE] * 4


@pytest.mark.parametrize("mode", ["L", "P"])
def test_what_the_first_frame_of_a_gif_leaves_free_is_white(mode: str) -> None:
    frame = Image.new("RGB", (4, 4), (9, 9, 9) if mode == "L" else (0, 0, 200)).convert(mode)
    encoded = bytearray(encode(frame, "GIF"))
    encoded[6:10] = struct.pack("<HH", 8, 6)
    at = encoded.index(b",", 13)
    encoded[at + 1 : at + 5] = struct.pack("<HH", 3, 1)
    seen = pixels(bytes(encoded))
    assert seen.shape == (6, 8, 3)
    inside = np.zeros((6, 8), bool)
    inside[1:5, 3:7] = True
    assert (seen[~inside] == 255).all()
    assert (seen[inside] == np.asarray(frame.convert("RGB"))[0, 0]).all()
    assert np.array_equal(pixels(bytes(encoded), "reference"), plain(bytes(encoded)))


def test_the_first_frame_of_a_webp_animation_is_laid_on_white() -> None:
    small = Image.new("RGBA", (8, 6))
    small.paste((0, 0, 200, 255), (2, 2, 6, 4))
    encoded = encode(
        small, "WEBP", lossless=True, save_all=True, append_images=[half_clear().resize((8, 6))]
    )
    seen = pixels(encoded)
    assert seen[0, 0].tolist() == WHITE
    assert seen[3, 3].tolist() == [0, 0, 200]
    assert look_picture(encoded, LIMIT).frames == 2


@pytest.mark.parametrize(
    ("kind", "frames"), [("GIF", 2), ("TIFF", 2), ("PNG", 3), ("WEBP", 3), ("AVIF", 3), ("MPO", 3)]
)
def test_looking_tells_whether_there_are_more_frames(kind: str, frames: int) -> None:
    others = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    encoded = encode(picture(), kind, save_all=True, append_images=others)
    assert look_picture(encoded, LIMIT).frames == frames
    assert look_picture(encode(picture(), kind), LIMIT).frames == 1


def test_a_number_of_frames_that_cannot_be_is_not_passed_on() -> None:
    """What is no small number cannot be sent, and a worker that says "none" would be taken for
    hijacked."""
    for told, passed_on in ((0.0, 1), (3.0, 3), (1e30, 1 << 31)):
        stack = bytearray(sample("SPIDER"))
        for word, value in ((24, 2.0), (26, told)):
            stack[4 * (word - 1) : 4 * word] = struct.pack("<f", value)
        assert look_picture(bytes(stack), LIMIT).frames == passed_on


@pytest.mark.parametrize("kind", ["AVIF", "MPO", "JPEG2000"])
@pytest.mark.parametrize("orientation", [6, 8])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    """AVIF keeps it beside the picture as a turn, not as a tag. JPEG 2000 has none."""
    options: dict[str, Any] = {} if kind == "JPEG2000" else {"exif": turned(orientation)}
    beside = stored(picture(), orientation)
    encoded = encode(beside, kind, **options)
    shown = np.asarray(picture() if options else beside)
    assert np.abs(pixels(encoded).astype(int) - shown).max() < 16
    facts = look_picture(encoded, LIMIT)
    assert (facts.height, facts.width) == shown.shape[:2]


@pytest.mark.parametrize("behind", [False, True])
def test_the_orientation_of_a_png_may_stand_behind_its_pixels(behind: bool) -> None:
    encoded = encode(picture(), exif=turned(6))
    exif = png_chunk(b"eXIf", turned(6)[6:])
    assert exif in encoded
    if behind:
        encoded = encoded.replace(exif, b"").replace(png_chunk(b"IEND", b""), exif) + png_chunk(
            b"IEND", b""
        )
    facts = look_picture(encoded, LIMIT)
    assert (facts.orientation, facts.width, facts.height) == (6, *picture().size[::-1])
    assert pixels(encoded).shape[:2] == (facts.height, facts.width)


@pytest.mark.skipif("JXL" not in FORMATS, reason="pillow-jxl-plugin is not installed")
def test_a_tag_beside_a_jpeg_xl_picture_does_not_turn_it() -> None:
    encoded = encode(picture(), "JXL", lossless=True, exif=turned(6))
    assert np.array_equal(pixels(encoded), np.asarray(picture()))
    assert look_picture(encoded, LIMIT).orientation == 1


@pytest.mark.skipif("JXL" not in FORMATS, reason="pillow-jxl-plugin is not installed")
def test_a_jpeg_inside_jpeg_xl_is_turned_once(tmp_path: Any) -> None:
    jpeg = tmp_path / "turned.jpg"
    jpeg.write_bytes(encode(picture(), "JPEG", exif=turned(6)))
    sink = io.BytesIO()
    with Image.open(jpeg) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source.save(sink, "JXL")
    assert np.array_equal(pixels(sink.getvalue()), pixels(jpeg.read_bytes()))
    for treatment in TREATMENTS:
        facts = look_picture(sink.getvalue(), LIMIT, treatment)
        assert (facts.height, facts.width) == pixels(sink.getvalue(), treatment).shape[:2]


@pytest.mark.parametrize("treatment", ["normalized", "reference"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colour_profiles_are_ignored(kind: str, treatment: Treatment) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with_one = encode(picture(), kind, icc_profile=profile)
    assert profile[:60] in with_one or kind == "PNG"
    assert np.array_equal(pixels(with_one, treatment), pixels(encode(picture(), kind), treatment))
