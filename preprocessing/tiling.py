"""From an upright RGB picture to the tiles InternVL was trained on. Called by the decode worker.

Everything here equals the reference preprocessing bit for bit, odd corners included: the grid
is the one whose aspect ratio is nearest, a picture is stretched to it rather than padded, and
small pictures are enlarged. It knows Pillow but no files, limits or processes.
"""

import functools
import math

from PIL import Image

from preprocessing.media import TileSettings


@functools.cache
def _candidates(side: int, least: int, most: int) -> tuple[tuple[float, float, int, int], ...]:
    """Every grid as (columns / rows, area from which it wins a tie, columns, rows), by size.

    Grids of equal size stand in lexicographic order. The reference takes them in the order of a
    Python set; tests/unit/test_tiling.py shows that no picture up to 5000 pixels a side can tell.
    """
    return tuple(
        (columns / rows, 0.5 * side * side * size, columns, rows)
        for size in range(least, most + 1)
        for columns in range(1, size + 1)
        for rows in (size // columns,)
        if columns * rows == size
    )


def choose_grid(width: int, height: int, side: int, least: int, most: int) -> tuple[int, int]:
    """The (columns, rows) for a picture, ``least <= columns * rows <= most``.

    The nearest aspect ratio wins. Among equally near ones the larger grid wins, if the picture
    has more pixels than half of the pixels that grid would show; else the smaller one.
    """
    aspect, area = width / height, width * height
    nearest, best = math.inf, (1, 1)
    for ratio, enough, columns, rows in _candidates(side, least, most):
        distance = abs(aspect - ratio)
        if distance < nearest:
            nearest, best = distance, (columns, rows)
        elif distance == nearest and area > enough:
            best = columns, rows
    return best


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
    planes = b"".join(band.tobytes() for part in parts for band in part.split())
    return planes, len(parts), columns, rows
