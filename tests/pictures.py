"""Small pictures of every format that the server reads, and files that only promise pixels.

Pillow writes two thirds of the formats, and pillow-heif HEIC; the others are written here by hand
from their headers.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

# Size and pixels that are different in every corner.
WIDTH, HEIGHT = 48, 32


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    if kind == "HEIF":  # what Pillow has for that name is the server's reader, which cannot write
        pillow_heif.from_pillow(picture).save(sink, **options)
    else:
        picture.save(sink, kind, **options)
    return sink.getvalue()


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Two crossing ramps."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), 90)))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG written by hand; ``rows`` are unfiltered scan lines with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *extra,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


# By hand: (width, height, grey or RGB bytes) -> the file. Without bytes it is a promise.


def gif(width: int, height: int, _: bytes) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0, 0, 0)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    return b"GIF89a" + screen + frame + b"\x08\0"


def dib(width: int, height: int, rgb: bytes) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    pad = b"\0" * (-3 * width % 4)
    return info + b"".join(_swapped(row) + pad for row in reversed(_rows(width, rgb)))


def bmp(width: int, height: int, rgb: bytes) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + dib(width, height, rgb)


def jpeg(width: int, height: int, _: bytes) -> bytes:
    frame = b"\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\0"
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + scan


def tiff(width: int, height: int, _: bytes) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 4, height), (279, 4, 4)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, form, 1, value) for tag, form, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def webp(width: int, height: int, _: bytes) -> bytes:
    """One colour, a whole and valid file of 34 bytes."""
    bits = (width - 1 & 0x3FFF) | (height - 1 & 0x3FFF) << 14
    body = b"\x2f" + struct.pack("<I", bits) + bytes.fromhex("071011fd0f4444ff03")
    return b"RIFF\x1a\0\0\0WEBPVP8L\x0e\0\0\0" + body


def ico(width: int, height: int, rgb: bytes) -> bytes:
    """The folder says one pixel, the PNG inside what it likes."""
    inside = png(width, height, 8, 2, b"".join(b"\0" + row for row in _rows(width, rgb)))
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 24, len(inside), 22) + inside


def cur(width: int, height: int, rgb: bytes) -> bytes:
    folder = struct.pack("<BBBBHHII", width & 255, height & 255, 0, 0, 0, 0, 0, 22)
    header = dib(width, height, rgb)
    return b"\0\0\2\0\1\0" + folder + header[:8] + struct.pack("<i", 2 * height) + header[12:]


def icns(width: int, height: int, _: bytes) -> bytes:
    inside = png(width, height, 8, 2, b"")
    block = b"ic10" + struct.pack(">I", 8 + len(inside)) + inside
    return b"icns" + struct.pack(">I", 8 + len(block)) + block


def ppm(width: int, height: int, rgb: bytes) -> bytes:
    return b"P6 %d %d 255\n" % (width, height) + rgb


def psd(width: int, height: int, rgb: bytes) -> bytes:
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3)
    return head + bytes(14) + rgb[::3] + rgb[1::3] + rgb[2::3]


def dds(width: int, height: int, _: bytes) -> bytes:
    file = bytearray(encode(picture(), "DDS"))
    file[12:20] = struct.pack("<II", height, width)
    return bytes(file[:128])


def qoi(width: int, height: int, _: bytes) -> bytes:
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0)


def pcx(width: int, height: int, rgb: bytes) -> bytes:
    file = bytearray(
        encode(Image.frombytes("RGB", (width, height), rgb) if rgb else picture(), "PCX")
    )
    file[8:12] = struct.pack("<HH", width - 1, height - 1)
    return bytes(file if rgb else file[:128])


def dcx(width: int, height: int, rgb: bytes) -> bytes:
    return struct.pack("<III", 987654321, 12, 0) + pcx(width, height, rgb)


def sgi(width: int, height: int, _: bytes) -> bytes:
    return struct.pack(">HBBHHHH", 474, 0, 1, 3, width, height, 3) + bytes(500)


def sun(width: int, height: int, rgb: bytes) -> bytes:
    head = struct.pack(">8I", 0x59A66A95, width, height, 24, 0, 1, 0, 0)
    return head + _swapped(rgb)


def xbm(width: int, height: int, _: bytes) -> bytes:
    return (
        b"#define a_width %d\n#define a_height %d\n" % (width, height)
        + b"static char a_bits[] = {\n"
    )


def xpm(width: int, height: int, rgb: bytes) -> bytes:
    head = b'/* XPM */\nstatic char *a[] = {\n"%d %d 2 1",\n"x c #102030",\n"o c None",\n'
    rows = [b'"' + b"x" * (width - 1) + b'o",\n'] * (height if rgb else 0)
    return head % (width, height) + b"".join(rows)


def fits(width: int, height: int, rgb: bytes) -> bytes:
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", f"NAXIS1  = {width}",
             f"NAXIS2  = {height}", "END"]  # fmt: skip
    return "".join(card.ljust(80) for card in cards).encode().ljust(2880) + rgb[::3].ljust(2880)


def blp(width: int, height: int, _: bytes) -> bytes:
    return b"BLP2" + struct.pack("<ibbbbII", 1, 1, 0, 0, 0, width, height)


def fli(width: int, height: int, rgb: bytes) -> bytes:
    chunk = struct.pack("<IH", 6 + width * height, 16) + rgb[::3]
    frame = struct.pack("<IHH8x", 16 + len(chunk), 0xF1FA, 1) + chunk
    return struct.pack("<IHHHHHH", 128, 0xAF12, 1, width, height, 8, 3).ljust(128, b"\0") + frame


def ftex(width: int, height: int, rgb: bytes) -> bytes:
    return (
        b"FTEX"
        + struct.pack("<8i", 1, width, height, 1, 1, 1, 32, len(rgb))[:28]
        + struct.pack("<i", len(rgb))
        + rgb
    )


def gbr(width: int, height: int, rgb: bytes) -> bytes:
    return struct.pack(">5I", 28, 2, width, height, 1) + b"GIMP" + bytes(4) + rgb[::3]


def mcidas(width: int, height: int, rgb: bytes) -> bytes:
    words = [0] * 65
    words[2], words[9], words[10], words[11], words[14], words[34] = 4, height, width, 1, 1, 256
    return struct.pack("!64i", *words[1:]) + rgb[::3]


def msp(width: int, height: int, _: bytes) -> bytes:
    words = [*struct.unpack("<2H", b"DanM"), width, height, 1, 1, 1, 1, width, height, 0, 0, 0]
    check = 0
    for word in words:
        check ^= word
    return struct.pack("<16H", *words, check, 0, 0)[:32]


def pixar(width: int, height: int, rgb: bytes) -> bytes:
    head = bytearray(1024)
    head[:4] = b"\x80\xe8\0\0"
    head[416:420] = struct.pack("<HH", height, width)
    head[424:428] = struct.pack("<HH", 14, 2)
    return bytes(head) + rgb


def xvthumb(width: int, height: int, rgb: bytes) -> bytes:
    return b"P7 332\n#END_OF_COMMENTS\n%d %d 255\n" % (width, height) + rgb[::3]


def pcd(_: int, __: int, rgb: bytes) -> bytes:
    """Always 768 x 512 pixels."""
    return bytes(2048) + b"PCD_".ljust(2048 * 95, b"\0") + (bytes(768 * 512 * 2) if rgb else b"")


def imt(width: int, height: int, rgb: bytes) -> bytes:
    return b"width %d\nheight %d\npixel n8\n\x0c" % (width, height) + rgb[::3]


def spider(width: int, height: int, _: bytes) -> bytes:
    file = bytearray(encode(picture().convert("F"), "SPIDER"))
    for word, value in ((1, 1), (2, height), (12, width)):
        file[4 * (word - 1) : 4 * word] = struct.pack("<f", value)
    return bytes(file[:200])


def tga(width: int, height: int, _: bytes) -> bytes:
    return struct.pack("<BBB5xHHHHBB", 0, 0, 2, 0, 0, width, height, 24, 0)


def jpeg2000(width: int, height: int, _: bytes) -> bytes:
    return _patched(encode(picture(), "JPEG2000"), b"ihdr", ">II", (HEIGHT, WIDTH), (height, width))


def avif(width: int, height: int, _: bytes) -> bytes:
    return _patched(
        encode(picture(), "AVIF"), b"ispe\0\0\0\0", ">II", (WIDTH, HEIGHT), (width, height)
    )


def heif(width: int, height: int, _: bytes) -> bytes:
    old = (64, 64)  # of smaller pictures the encoder makes this, and cuts it
    return _patched(encode(picture(*old), "HEIF"), b"ispe\0\0\0\0", ">II", old, (width, height))


def jxl(width: int, height: int, _: bytes) -> bytes:
    bits = 0 | 3 << 1 | height - 1 << 3 | 0 << 33 | 3 << 36 | width - 1 << 38 | 1 << 68
    return b"\xff\x0a" + bits.to_bytes(9, "little")


def _patched(file: bytes, before: bytes, form: str, old: Any, new: Any) -> bytes:
    found = before + struct.pack(form, *old)
    assert found in file
    return file.replace(found, before + struct.pack(form, *new))


def _rows(width: int, rgb: bytes) -> list[bytes]:
    return [rgb[start : start + 3 * width] for start in range(0, len(rgb), 3 * width or 1)]


def _swapped(rgb: bytes) -> bytes:
    """RGB to BGR."""
    swapped = bytearray(rgb)
    swapped[::3], swapped[2::3] = rgb[2::3], rgb[::3]
    return bytes(swapped)


BY_HAND: dict[str, Callable[[int, int, bytes], bytes]] = {
    "PNG": lambda width, height, _: png(width, height, 8, 2, b""),
    "JPEG": jpeg, "WEBP": webp, "GIF": gif, "BMP": bmp, "DIB": dib, "TIFF": tiff, "AVIF": avif,
    "JPEG2000": jpeg2000, "ICO": ico, "CUR": cur, "ICNS": icns, "PPM": ppm, "PSD": psd,
    "DDS": dds, "QOI": qoi, "PCX": pcx, "DCX": dcx, "SGI": sgi, "SUN": sun, "XBM": xbm,
    "XPM": xpm, "FITS": fits, "BLP": blp, "FLI": fli, "FTEX": ftex, "GBR": gbr,
    "MCIDAS": mcidas, "MSP": msp, "PIXAR": pixar, "XVTHUMB": xvthumb, "PCD": pcd,
    "IMT": imt, "SPIDER": spider, "TGA": tga, "JXL": jxl, "HEIF": heif,
}  # fmt: skip
_SAVED_AS = {"XBM": "1", "MSP": "1", "BLP": "P", "SPIDER": "F"}
_WRITTEN = {"CUR", "PSD", "DCX", "SUN", "XPM", "FITS", "FLI", "FTEX", "GBR", "MCIDAS", "PIXAR",
            "XVTHUMB", "PCD", "IMT"}  # fmt: skip


def sample(kind: str, **options: Any) -> bytes:
    """A good file of a format in ``preprocessing.images.FORMATS``."""
    shown = picture()
    if kind in _WRITTEN:
        return BY_HAND[kind](WIDTH, HEIGHT, shown.tobytes())
    return encode(shown.convert(_SAVED_AS.get(kind, "RGB")), kind, **options)


def promise(kind: str, width: int, height: int) -> bytes:
    """A file whose header has this size, and that has no pixels behind it."""
    return BY_HAND[kind](width, height, b"")


def turned(orientation: int) -> bytes:
    """The EXIF data that say so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    """As a camera stores a picture under this value of the tag: EXIF's table, not Pillow's code."""
    pixels = np.asarray(upright)
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    mirrors = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}
    down, across = mirrors.get(orientation, (1, 1))
    return Image.fromarray(np.ascontiguousarray(pixels[::down, ::across]), "RGB")


def lossless(shown: Image.Image) -> dict[str, bytes]:
    """One RGB picture of at most 256 pixels a side and 8 colours in many encodings."""
    assert max(shown.size) <= 256
    palette = shown.quantize(8)
    assert palette.convert("RGB").tobytes() == shown.tobytes()
    encodings = {
        "PNG": encode(shown),
        "PNG with a palette": encode(palette),
        "PNG with alpha": encode(shown.convert("RGBA")),
        "APNG": encode(shown, save_all=True, append_images=[Image.new("RGB", shown.size)]),
        "WebP": encode(shown, "WEBP", lossless=True),
        "GIF": encode(palette, "GIF"),
        "BMP": encode(shown, "BMP"),
        "BMP with a palette": encode(palette, "BMP"),
        "TIFF": encode(shown, "TIFF"),
        "TIFF LZW": encode(shown, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(shown, "TIFF", compression="tiff_adobe_deflate"),
        "JPEG 2000": encode(shown, "JPEG2000"),
        "ICO": encode(shown, "ICO", sizes=[shown.size]),
        "TGA": encode(shown, "TGA", compression="tga_rle"),
        "SGI": encode(shown, "SGI"),
        "PCX": encode(shown, "PCX"),
        "DDS": encode(shown, "DDS"),
        "QOI": encode(shown, "QOI"),
    }
    for kind in ("PPM", "PSD", "SUN", "FTEX", "PIXAR", "CUR", "DIB"):
        encodings[kind] = BY_HAND[kind](*shown.size, shown.tobytes())
    exact = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
    encodings["HEIC"] = encode(shown, "HEIF", **exact)
    encodings["HEIC in tiles"] = encode(shown, "HEIF", tile_size=64, **exact)
    if "JXL" in Image.SAVE:
        encodings["JPEG XL"] = encode(shown, "JXL", lossless=True)
    return encodings
