"""From an upright RGB picture to the tiles InternVL was trained on. Called by the decode worker.

Everything here equals the reference preprocessing bit for bit: grid.py chooses the grid, a picture
is stretched to it rather than padded. It knows Pillow but no files, limits or processes.
"""

from PIL import Image

from preprocessing.grid import choose_grid
from preprocessing.media import TileSettings


def tile(picture: Image.Image, settings: TileSettings) -> tuple[bytes, int, int, int]:
    """Cut an RGB picture into (tiles, count, columns, rows).

    ``tiles`` is uint8 ``[count, 3, side, side]``, row by row, then the whole picture as one
    tile if the grid has several tiles and the settings ask for a thumbnail.
    """
    side = settings.side
    columns, rows = choose_grid(*picture.size, side, settings.min_tiles, settings.max_tiles)
    stretched = picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    parts = [
        stretched.crop((left, top, left + side, top + side))
        for top in range(0, rows * side, side)
        for left in range(0, columns * side, side)
    ]
    if settings.use_thumbnail and len(parts) > 1:
        parts.append(picture.resize((side, side), Image.Resampling.BICUBIC))
    planes = b"".join(part.tobytes("raw", band) for part in parts for band in "RGB")
    return planes, len(parts), columns, rows
