"""What Pillow's plugins do not tell before they decode, or at all. Worker only.

For most formats Pillow's own ``open`` reads no more than the header. The plugins of icons and
JPEG XL decode as they open: their size is read here first, so that a bomb among them is refused
before a pixel of it exists. A PNG's orientation may stand behind its pixels. A JPEG 2000 or HEIC
file that was cut off is decoded without a word, and HEIC tells the size of what is shown, not of
what has to be decoded for it. Whatever is wrong with a file raises any Exception, as in Pillow's
plugins.
"""

import dataclasses
import io
import re
from collections.abc import Iterator

from PIL import BmpImagePlugin, IcoImagePlugin, PngImagePlugin

_PNG = b"\x89PNG\r\n\x1a\n"
_FRAMES = (b"IDAT", b"acTL", b"fcTL", b"fdAT")
_JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_STREAM = b"\xff\x0a"
_JPEG_2000_STREAM, _JPEG_2000_END = b"\xff\x4f\xff\x51", b"\xff\xd9"


@dataclasses.dataclass(frozen=True)
class Header:
    """``width`` and ``height`` in pixels are those before any turn; ``turned`` says whether the
    decoder applies the ``orientation`` (1 to 8 as in EXIF)."""

    format: str
    width: int
    height: int
    orientation: int = 1
    turned: bool = False


def read(encoded: bytes | bytearray) -> Header | None:
    """The header of an icon or a JPEG XL picture; None for anything else."""
    if encoded.startswith(b"\0\0\1\0"):
        return _icon(encoded)
    if encoded.startswith((_JXL_STREAM, _JXL_BOX)):
        return _jpeg_xl(encoded)
    return None


def _icon(encoded: bytes | bytearray) -> Header:
    """The entry that Pillow shows: the first of the largest. Its own header counts."""
    source = io.BytesIO(encoded)
    start = IcoImagePlugin.IcoFile(source).entry[0].offset
    source.seek(start)
    if encoded.startswith(_PNG, start):
        return Header("ICO", *PngImagePlugin.PngImageFile(source).size)
    width, height = BmpImagePlugin.DibImageFile(source).size
    return Header("ICO", width, height // 2)  # above its mask


class _Bits:
    """The bits of a codestream, lowest first."""

    def __init__(self, data: bytes) -> None:
        self._left = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        value = self._left & ((1 << count) - 1)
        self._left >>= count
        return value


def _jpeg_xl(encoded: bytes | bytearray) -> Header:
    """ISO/IEC 18181-1: SizeHeader, then the orientation at the beginning of ImageMetadata."""
    bits = _Bits(_codestream(encoded)[len(_JXL_STREAM) :])
    small = bits.take(1)
    height = _jpeg_xl_side(bits, small)
    ratio = bits.take(3)
    across, down = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    width = height * across // down if ratio else _jpeg_xl_side(bits, small)
    has_all_defaults = bits.take(1)
    has_extra_fields = not has_all_defaults and bits.take(1)
    orientation = 1 + bits.take(3) if has_extra_fields else 1
    return Header("JXL", width, height, orientation, not _keeps_jpeg(encoded))


def _keeps_jpeg(encoded: bytes | bytearray) -> bool:
    """Whether a JPEG is to be made of it, with the tag that it had."""
    return encoded.startswith(_JXL_BOX) and any(kind == b"jbrd" for kind, _, _ in boxes(encoded))


def _jpeg_xl_side(bits: _Bits, small: int) -> int:
    if small:
        return 8 * (1 + bits.take(5))
    return 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


def _codestream(encoded: bytes | bytearray) -> bytes:
    """The first bytes of a bare codestream, or of that in a box "jxlc" or "jxlp"."""
    if encoded.startswith(_JXL_STREAM):
        return bytes(encoded[:32])
    for kind, start, end in boxes(encoded):
        if kind in (b"jxlc", b"jxlp"):
            start += 4 if kind == b"jxlp" else 0
            return bytes(encoded[start : min(end, start + 32)])
    raise ValueError("a JPEG XL file without a codestream")


def without_pixels(encoded: bytes | bytearray) -> bytes | bytearray:
    """A PNG without its frames, so that a tag behind the pixels can be read without decoding them.
    Any other file as it is."""
    if not encoded.startswith(_PNG):
        return encoded
    start, kept = len(_PNG), [_PNG]
    while start + 8 <= len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        if encoded[start + 4 : start + 8] not in _FRAMES:
            kept.append(bytes(encoded[start:end]))
        start = end
    return b"".join(kept)


def is_cut(encoded: bytes | bytearray, kind: str | None) -> bool:
    """Whether a picture lacks its end, which its decoder would fill: the last tiles of HEIC, and
    JPEG 2000. False for other formats."""
    if kind == "HEIF":
        # What follows the picture, as some phones' films do, may be anything.
        return any(end > len(encoded) for name, _, end in boxes(encoded) if name == b"mdat")
    if kind != "JPEG2000":
        return False
    if encoded.startswith(_JPEG_2000_STREAM):
        ends = [len(encoded)]
    else:
        ends = [end for name, _, end in boxes(encoded) if name == b"jp2c"]
    if not ends or ends[0] > len(encoded):
        return True
    tail = bytes(encoded[ends[0] - 64 : ends[0]])
    return not tail.rstrip(b"\0").endswith(_JPEG_2000_END)


def heif_sizes(encoded: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Width and height of every picture in a HEIF file, before cropping: tiles, canvases,
    thumbnails (ISO/IEC 23008-12, ImageSpatialExtentsProperty)."""
    for kind, start, end in boxes(encoded):
        if kind == b"meta":
            for found in re.finditer(rb"ispe(?=.{4}(.{4})(.{4}))", encoded[start:end], re.S):
                width, height = found.groups()
                yield int.from_bytes(width, "big"), int.from_bytes(height, "big")


def boxes(encoded: bytes | bytearray) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte of its content, byte behind it) of every box of an ISO file, as it says."""
    start = 0
    while start + 8 <= len(encoded):
        length, kind = (
            int.from_bytes(encoded[start : start + 4], "big"),
            encoded[start + 4 : start + 8],
        )
        content = start + 8
        if length == 1:
            length, content = int.from_bytes(encoded[content : content + 8], "big"), content + 8
        end = start + length if length else len(encoded)
        if end < content:
            return
        yield bytes(kind), content, end
        start = end
