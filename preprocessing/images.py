"""Hostile bytes in, one upright RGB picture out. Runs in the decode worker only.

What a person sees is what the model gets; the rules, each the default and the only choice:

- Formats: those of ``FORMATS``; the content decides, never a file name or a MIME type.
- Size: width and height are read from the header and checked before any pixel exists.
- Truncated or damaged files are refused, never filled with grey.
- Several frames (GIF, WebP, TIFF, MPO, APNG): the first one.
- Orientation: the EXIF (or XMP) tag is applied; a damaged tag counts as upright.
- Transparency (alpha channel, or a transparent palette entry or colour): laid on white.
- 16-bit grey: 0..65535 becomes 0..255, rounded.
- Float and 32-bit grey: 0..1 (float) or 0..65535 (integer) becomes 0..255; the range is widened
  to the picture's own darkest and brightest value where these lie outside.
- Colour spaces (CMYK, YCbCr, Lab), palettes, grey and black-and-white: Pillow's conversion to
  RGB. Colour profiles are ignored, as in the reference.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import cast

# The plugins are imported by name so that opening a file imports nothing: inside the sandbox no
# module can be read any more. (MPO is a JPEG with more pictures behind it, as phones write them.)
from PIL import (  # noqa: F401
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from preprocessing.media import Reason

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_WIDE_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """The bytes are no picture this server decodes."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def open_picture(encoded: bytes | bytearray, max_pixels: int) -> Image.Image:
    """Decode to an upright picture of mode RGB. Raises Unreadable, and nothing else."""
    try:
        with _pillow_limit(max_pixels):
            picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
            _check_size(picture, max_pixels)
            picture.load()
            _check_size(picture, max_pixels)
            return _to_rgb(_upright(picture))
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(Reason.UNSUPPORTED) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
        raise Unreadable(Reason.TOO_LARGE) from None
    except Exception:
        # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, IndexError ...
        raise Unreadable(Reason.BROKEN) from None


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Make Pillow's own bomb checks, which see frames our check does not, use our limit."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise Unreadable(Reason.EMPTY)
    if width * height > max_pixels:
        raise Unreadable(Reason.TOO_LARGE)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # The tag is a hint beside the pixels: a damaged one does not make them unreadable.
        orientation = 1
    method = _UPRIGHT.get(orientation)
    if method is None:
        return picture
    return picture.transpose(method)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _WIDE_MODES:
        picture = _to_eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGB", picture.size, "white")
        page.paste(picture, mask=picture.getchannel("A"))
        return page
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale wide grey values to L, or to LA if one value is transparent; see the module's rules."""
    wide = picture.convert("F")
    low, high = 0.0, 1.0 if picture.mode == "F" else 65535.0
    darkest, brightest = cast(tuple[float, float], wide.getextrema())
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        raise Unreadable(Reason.BROKEN)
    low, high = min(low, darkest), max(high, brightest)
    # Pillow's conversion to L truncates: half a level more makes it round.
    grey = _linear(wide, 255 / (high - low), 0.5 - 255 * low / (high - low))
    clear = picture.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    above, below = _linear(wide, 255, -255 * clear), _linear(wide, -255, 255 * clear)
    return Image.merge("LA", (grey, ImageChops.lighter(above, below)))


def _linear(wide: Image.Image, scale: float, offset: float) -> Image.Image:
    """``wide * scale + offset``, truncated and clipped to 0..255."""
    return wide.point(lambda value: value * scale + offset).convert("L")
