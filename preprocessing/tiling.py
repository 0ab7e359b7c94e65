"""From an upright RGB picture to the tiles InternVL was trained on. Called by the decode worker.

Everything here equals the reference preprocessing bit for bit: grid.py chooses the grid, a picture
is stretched to it rather than padded. It knows Pillow but no files, limits or processes.
"""

from PIL import Image

from preprocessing import bicubic
from preprocessing.grid import choose_grid
from preprocessing.media import TileSettings

# A JPEG may be decoded at so many times the pixels of its grid, each way: the difference that this
# makes is measured in tests/unit/test_fast_decoding.py.
REDUCED = 2


def enough_pixels(size: tuple[int, int], settings: TileSettings) -> tuple[int, int]:
    """Width and height at which a picture of this size may be decoded under ``settings.fast``:
    ``REDUCED`` times what its grid shows."""
    columns, rows = choose_grid(*size, settings.side, settings.min_tiles, settings.max_tiles)
    return REDUCED * columns * settings.side, REDUCED * rows * settings.side


def tile(
    picture: Image.Image, settings: TileSettings, size: tuple[int, int] | None = None
) -> tuple[bytearray, int, int, int]:
    """Cut an RGB picture into (tiles, count, columns, rows).

    ``tiles`` is uint8 ``[count, 3, side, side]``, row by row, then the whole picture as one
    tile if the grid has several tiles and the settings ask for a thumbnail. ``size`` is that of
    the whole picture where a reduced one is given.
    """
    side = settings.side
    columns, rows = choose_grid(
        *(size or picture.size), side, settings.min_tiles, settings.max_tiles
    )
    thumbnail = settings.use_thumbnail and columns * rows > 1
    tiles = bicubic.tiles(picture, side, columns, rows, thumbnail)
    return tiles, columns * rows + thumbnail, columns, rows
