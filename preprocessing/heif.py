"""HEIC for Pillow: the format "HEIF", where pi-heif is installed. Worker only.

A plugin of our own over pi-heif's decoder (libheif and libde265), because its own plugin reads much
that nobody here looks at, and its version 1.4.0 ends the process over a name that is not UTF-8.
"""

import importlib
import re
from typing import Any

from PIL import Image, ImageFile

FORMAT = "HEIF"
_BRANDS = re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_EXIF = re.compile(rb"Exif\0\0(II\*\0|MM\0\*)")
_MOST_EXIF = 1 << 16


def register() -> None:
    """Make Pillow read HEIC. Raises ImportError where pi-heif is not installed."""
    library: Any = importlib.import_module("_pi_heif")

    class HeifFile(ImageFile.ImageFile):
        """The primary picture of a file; ``n_frames`` is how many there are."""

        format = FORMAT
        format_description = "HEIF"
        n_frames = 1
        _picture: Any = None

        def _open(self) -> None:
            encoded = self.fp.read() if self.fp else b""
            # Threads besides the one that libde265 starts in any case; 10 bits to 8, blue first,
            # rows without padding, grey to 16 bits; which decoder; without limits.
            options = (0, True, False, False, True, "", False)
            try:
                pictures = [one for one in library.load_file(encoded, *options) if one is not None]
            except (OSError, ValueError, RuntimeError, EOFError):
                raise SyntaxError("no HEIF file") from None
            self._picture = next((one for one in pictures if one.primary), pictures[0])
            self._size, self._mode = self._picture.size_mode
            self.n_frames = len(pictures)
            # Told, not obeyed: what turns the picture is its property.
            found = _EXIF.search(encoded)
            if found:
                self.info["exif"] = encoded[found.start() : found.start() + _MOST_EXIF]

        def load(self) -> Any:
            picture, self._picture = self._picture, None
            if picture is not None:
                pixels = picture.data
                self._size, self._mode = picture.size_mode  # of what was decoded
                self.load_prepare()
                self.frombytes(pixels, "raw", (self.mode, picture.stride))
            return super().load()

    Image.register_open(FORMAT, HeifFile, lambda prefix: _BRANDS.match(prefix) is not None)
