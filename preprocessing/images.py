"""Hostile bytes in, one upright RGB picture out. Runs in the decode worker only.

What holds for every picture:

- Formats: those of ``FORMATS``; the content decides, never a file name or a MIME type.
- Size: width and height are read from the header and checked before any pixel exists.
- Truncated or damaged files are refused, never filled with grey; what a decoder does not notice,
  that of HEIC a damaged tile, is shown as it comes.
- Several frames or pages (GIF, WebP, TIFF, MPO, APNG, AVIF, icons): the first one, of an icon the
  largest, of HEIC the one that it calls primary.
- Colour profiles (ICC) are ignored, as in the reference.

The treatment ``normalized`` shows the model what a person sees:

- Orientation: the EXIF (or XMP) tag is applied, once; a damaged tag counts as upright. JPEG XL and
  HEIC keep the orientation in the picture itself, and their decoders apply it; a tag beside it does
  not count there, as the standards say.
- Transparency (alpha channel, a transparent palette entry or colour, an icon's mask, what the first
  frame of an animation leaves free): laid on white.
- 16-bit grey: 0..65535 becomes 0..255, rounded.
- Float and 32-bit grey: 0..1 (float) or 0..65535 (integer) becomes 0..255; the range is widened
  to the picture's own darkest and brightest value where these lie outside. Not-a-number and
  infinity have no grey: refused.
- Colour spaces (CMYK, YCbCr, Lab), palettes, grey and black-and-white: Pillow's conversion to
  RGB. 16-bit colour keeps its high bytes.

The treatment ``reference`` is ``Image.open(file).convert("RGB")`` to the bit, as in the model's own
code: nothing is turned that Pillow's decoder does not turn itself (TIFF, JPEG XL and HEIC are),
alpha is dropped, so that whatever colour hides there shows, and wide grey is clipped at 255.
"""

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

# ImageCms and MpoImagePlugin are what Pillow imports when it first meets Lab, or a JPEG with more
# pictures behind it.
from PIL import (
    AvifImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageCms,  # noqa: F401
    ImageFile,
    MpoImagePlugin,  # noqa: F401
    UnidentifiedImageError,
)

from preprocessing import headers, heif
from preprocessing.media import PictureFacts, Reason, Treatment

# Format -> the plugin that opens it, in the order in which they are tried: those without a
# signature at the beginning of the file come last. Pillow's others start programs (EPS, WMF), read
# no pixels (BUFR, GRIB, HDF5, MPEG), open whatever lies inside by any plugin (IPTC), need a
# library that we do not have (FPX, MIC), or are to leave it (IM).
_PLUGINS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "DIB": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "AVIF": "AvifImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "ICO": "IcoImagePlugin",
    "CUR": "CurImagePlugin",
    "ICNS": "IcnsImagePlugin",
    "PPM": "PpmImagePlugin",
    "PSD": "PsdImagePlugin",
    "DDS": "DdsImagePlugin",
    "QOI": "QoiImagePlugin",
    "PCX": "PcxImagePlugin",
    "DCX": "DcxImagePlugin",
    "SGI": "SgiImagePlugin",
    "SUN": "SunImagePlugin",
    "XBM": "XbmImagePlugin",
    "XPM": "XpmImagePlugin",
    "FITS": "FitsImagePlugin",
    "BLP": "BlpImagePlugin",
    "FLI": "FliImagePlugin",
    "FTEX": "FtexImagePlugin",
    "GBR": "GbrImagePlugin",
    "MCIDAS": "McIdasImagePlugin",
    "MSP": "MspImagePlugin",
    "PIXAR": "PixarImagePlugin",
    "XVTHUMB": "XVThumbImagePlugin",
    "PCD": "PcdImagePlugin",
    "IMT": "ImtImagePlugin",
    "SPIDER": "SpiderImagePlugin",
    "TGA": "TgaImagePlugin",
}
# Their decoders turn the picture themselves while they load.
_TURNED = {"TIFF", "JXL", "HEIF"}

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis")  # of pictures, not of sequences

_DEEP, _DEEP_LOW = "RGB;16B", "RGB;16L"  # raw modes of 16-bit colour, high byte first and last
_WIDE_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}

_MOST_FRAMES = 1 << 31  # that is told

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _load_plugins() -> list[str]:
    """Import every plugin now, so that opening a file imports nothing: inside the sandbox no
    module can be read any more. None but HEIC starts a thread. The formats that can be read."""
    formats = list(_PLUGINS)
    for plugin in _PLUGINS.values():
        importlib.import_module(f"PIL.{plugin}")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with contextlib.suppress(ImportError):
        jpeg_xl: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
        jpeg_xl.DECODE_THREADS = 0
        formats.append("JXL")
    with contextlib.suppress(ImportError):
        heif.register()
        formats.append(heif.FORMAT)
    return formats


FORMATS = _load_plugins()


def do_without_threads() -> None:
    """Refuse HEIC by name, from now on: its decoder would end the process."""
    with contextlib.suppress(ValueError):
        FORMATS.remove("HEIF")


class Unreadable(Exception):
    """The bytes are no picture this server decodes."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


def look_picture(
    encoded: bytes | bytearray, max_pixels: int, treatment: Treatment = "normalized"
) -> PictureFacts:
    """What the header says; no pixel is decoded. Raises Unreadable, and nothing else.

    Width and height are those of the picture that ``open_picture`` gives.
    """
    with _refusals(encoded, max_pixels):
        header = _check_early(encoded, max_pixels)
        if header is not None:
            width, height, orientation = header.width, header.height, header.orientation
            if orientation > 4 and (header.turned or treatment == "normalized"):
                width, height = height, width
            return PictureFacts(header.format, width, height, orientation)
        picture = _open(encoded, max_pixels)
        (width, height), orientation = picture.size, _orientation(picture)
        if picture.format == "PNG":
            with contextlib.suppress(Exception):
                orientation = _orientation(_open(headers.without_pixels(encoded), max_pixels))
        if treatment == "normalized" and picture.format not in _TURNED and orientation > 4:
            width, height = height, width
        return PictureFacts(picture.format or "", width, height, orientation, _frames(picture))


def open_picture(
    encoded: bytes | bytearray,
    max_pixels: int,
    treatment: Treatment = "normalized",
    enough: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode to a picture of mode RGB. Raises Unreadable, and nothing else.

    A JPEG whose width and height are ``enough`` at half its size or less is decoded at that size.
    """
    with _refusals(encoded, max_pixels):
        _check_early(encoded, max_pixels)
        picture = _open(encoded, max_pixels)
        if treatment == "normalized" and picture.format == "PNG" and _has_clear_colour(picture):
            return _to_rgb(_upright(_with_clear_colour(picture, _open(encoded, max_pixels))))
        if enough is not None:
            _shrink(picture, enough)
        picture.load()
        _check_size(picture.size, max_pixels)
        if treatment == "reference":
            return _plain_rgb(picture)
        if isinstance(picture, GifImagePlugin.GifImageFile):
            return _first_frame(picture)
        return _to_rgb(_upright(picture))


@contextlib.contextmanager
def _refusals(encoded: bytes | bytearray, max_pixels: int) -> Iterator[None]:
    """Turn whatever goes wrong inside into Unreadable."""
    try:
        with _pillow_limit(max_pixels):
            yield
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable(_unsupported(encoded)) from None
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


def _unsupported(encoded: bytes | bytearray) -> Reason:
    """HEIC, which phones write, is told from what is no picture at all."""
    head = bytes(encoded[:64])
    if head[4:8] != b"ftyp" or not any(brand in head for brand in _HEIC_BRANDS):
        return Reason.UNSUPPORTED
    return Reason.BROKEN if "HEIF" in FORMATS else Reason.NO_HEIC


def _check_early(encoded: bytes | bytearray, max_pixels: int) -> headers.Header | None:
    """The header of a picture that Pillow decodes as it opens it, after all checks."""
    header = headers.read(encoded)
    if header is not None:
        if header.format not in FORMATS:
            raise Unreadable(Reason.NO_JPEG_XL)
        _check_size((header.width, header.height), max_pixels)
    return header


def _open(encoded: bytes | bytearray, max_pixels: int) -> ImageFile.ImageFile:
    picture = Image.open(io.BytesIO(encoded), formats=FORMATS)
    _check_size(picture.size, max_pixels)
    if headers.is_cut(encoded, picture.format):
        raise Unreadable(Reason.BROKEN)
    if picture.format == "HEIF":
        # What is shown may be cut out of something larger, or put together from it; by less than
        # a block of HEVC every picture is larger.
        for width, height in headers.heif_sizes(encoded):
            _check_size((max(1, width - 63), max(1, height - 63)), max_pixels)
    return picture


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Unreadable(Reason.EMPTY)
    if width * height > max_pixels:
        raise Unreadable(Reason.TOO_LARGE)


def _orientation(picture: Image.Image) -> int:
    """1 to 8 as in EXIF; 1 for upright, for nonsense, and for JPEG XL (see the module's rules). Of
    HEIC it is the tag, which repeats what its decoder does."""
    if picture.format == "JXL" and not getattr(picture, "jpeg", False):
        return 1
    try:
        # Not the picture's own method: a PNG's decodes all pixels to see what comes after them.
        orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except Exception:
        # The tag is a hint beside the pixels: a damaged one does not make them unreadable.
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _frames(picture: ImageFile.ImageFile) -> int:
    """As many as the header tells, one at least; bounded, for a header may tell anything. GIF and
    TIFF do not, and 2 stands for several there."""
    if picture.format in ("GIF", "TIFF"):
        return 1 + bool(getattr(picture, "is_animated", False))
    if picture.format == "PSD":
        return 1  # Pillow counts its layers
    return min(max(1, int(getattr(picture, "n_frames", 1))), _MOST_FRAMES)


def _first_frame(picture: GifImagePlugin.GifImageFile) -> Image.Image:
    """On white where it does not cover the screen; there, Pillow shows the first colour."""
    box = picture.dispose_extent
    if box is None or box == (0, 0, *picture.size):
        return _to_rgb(picture)
    page = Image.new("RGB", picture.size, "white")
    page.paste(_to_rgb(picture.crop(box)), box)
    return page


def _shrink(picture: ImageFile.ImageFile, enough: tuple[int, int]) -> None:
    """Have the decoder of a JPEG leave out the finest frequencies, where no pixel is divided."""
    width, height = enough if _orientation(picture) < 5 else reversed(enough)
    for scale in (8, 4, 2):
        size = picture.width // scale, picture.height // scale
        whole = picture.width % scale == picture.height % scale == 0
        if whole and size[0] >= width and size[1] >= height:
            picture.draft(None, size)  # does nothing where it is no JPEG
            return


def _has_clear_colour(picture: ImageFile.ImageFile) -> bool:
    return "transparency" in picture.info and picture.tile[0].args == _DEEP


def _with_clear_colour(picture: ImageFile.ImageFile, again: ImageFile.ImageFile) -> Image.Image:
    """A PNG of 16-bit colours, one of them transparent. Pillow reads the high bytes only, by which
    no colour can be told from its neighbours; read in the other byte order they are the low ones.
    """
    again.tile = [tile._replace(args=_DEEP_LOW) for tile in again.tile]
    opaque = Image.new("L", picture.size)
    colour = picture.info.pop("transparency")
    for value, high, low in zip(colour, picture.split(), again.split(), strict=True):
        for byte, plane in ((value >> 8, high), (value & 0xFF, low)):
            differs = plane.point([255 * (level != byte) for level in range(256)])
            opaque = ImageChops.lighter(opaque, differs)
    picture.putalpha(opaque)
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    if picture.format == "HEIF":
        return picture  # its decoder has turned it
    method = _UPRIGHT.get(_orientation(picture))
    return picture if method is None else picture.transpose(method)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _WIDE_MODES:
        picture = _to_eight_bits(picture)
    if not picture.has_transparency_data:
        return _plain_rgb(picture)
    if picture.mode == "La":
        picture = picture.convert("LA")  # the only way out of it that keeps its alpha
    if picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture)
    return page


def _plain_rgb(picture: Image.Image) -> Image.Image:
    # Pillow would copy what is RGB already.
    return picture if picture.mode == "RGB" else picture.convert("RGB")


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
