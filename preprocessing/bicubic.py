"""Pillow's bicubic resize, cut into tiles: by Pillow, or in a tenth of the time by compiled code
(native/resize.c) that gives the same bytes. Called by tiling.py, in the decode worker.

The compiled code is there where a compiler was when this was installed. It is used if it agrees
with the Pillow that is installed on a few small pictures, which are tried when this is imported.
"""

import ctypes
import itertools
from typing import Any, cast

from PIL import Image

from wire import native

VERSION = 1
"""That of the functions' arguments, here and in resize.c: one more with every change of them."""
# Pillow hands over only pictures that lie in one piece of memory.
_PIECE = 1 << 30


class _ArrowArray(ctypes.Structure):
    """Arrow's C data interface, by which Pillow shows its pixels to others."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_open_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_open_capsule.restype = ctypes.c_void_p
_open_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Kernel:
    """The compiled code for one kind of processor."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self._resize = library.resize_tiles
        self._resize.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 7, ctypes.c_void_p]
        self._number = number

    def tiles(
        self, picture: Image.Image, side: int, columns: int, rows: int, thumbnail: bool
    ) -> bytearray | None:
        """As the function of the same name; None for a picture that this cannot do."""
        try:
            _, exported = picture.__arrow_c_array__()
        except ValueError:
            return None  # in several pieces
        pixels = _ArrowArray.from_address(_open_capsule(exported, b"arrow_array"))
        bands = pixels.children[0].contents  # uint8 [height * width * 4]
        if pixels.offset or bands.offset or bands.length != 4 * picture.width * picture.height:
            return None
        tiles = bytearray((columns * rows + thumbnail) * 3 * side * side)
        failed = self._resize(
            bands.buffers[1],
            *picture.size,
            side,
            columns,
            rows,
            thumbnail,
            self._number,
            (ctypes.c_char * len(tiles)).from_buffer(tiles),
        )
        if failed == -1:
            raise MemoryError
        return None if failed else tiles


def kernels() -> list[Kernel]:
    """All that this processor can run, the fastest first."""
    library = native.load(__file__, "_resize", VERSION)
    if library is None:
        return []
    numbers = range(library.resize_best_kernel(), library.resize_kernel_count())
    return [Kernel(library, number) for number in numbers]


def choose() -> Kernel | None:
    """The fastest, if it gives what the installed Pillow gives."""
    found = kernels()
    if not found:
        return None
    cast(Any, Image).core.set_block_size(_PIECE)
    return found[0] if _agrees(found[0]) else None


def _agrees(kernel: Kernel) -> bool:
    """On pictures enlarged and reduced, also at the border beyond which Pillow resizes columns
    first."""
    edges = 1, 7, 24, 90
    for width, height in [*itertools.product(edges, edges), (40, 68), (40, 69), (41, 70)]:
        bands = [Image.effect_noise((width, height), spread) for spread in (20, 99, 300)]
        job = Image.merge("RGB", bands), 12, 2, 3, True
        if kernel.tiles(*job) != with_pillow(*job):
            return False
    return True


def with_pillow(
    picture: Image.Image, side: int, columns: int, rows: int, thumbnail: bool
) -> bytearray:
    """As ``tiles``, by Pillow alone."""
    stretched = picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    parts = [
        stretched.crop((left, top, left + side, top + side))
        for top in range(0, rows * side, side)
        for left in range(0, columns * side, side)
    ]
    if thumbnail:
        parts.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    return bytearray().join(part.tobytes("raw", band) for part in parts for band in "RGB")


_kernel = choose()


def tiles(picture: Image.Image, side: int, columns: int, rows: int, thumbnail: bool) -> bytearray:
    """A picture of mode RGB as uint8 ``[count, 3, side, side]``: ``rows * columns`` tiles row by
    row, then the whole of it as one if ``thumbnail``. Raises MemoryError."""
    job = picture, side, columns, rows, thumbnail
    done = None if _kernel is None else _kernel.tiles(*job)
    return with_pillow(*job) if done is None else done
