"""Into how many tiles a picture is cut: the one place that decides it, for the tiles themselves and
for whoever must know their number before there are any. Pure.

Equal to the reference, odd corners included: the grid is the one whose aspect ratio is nearest, a
picture is stretched to it rather than padded, and small pictures are enlarged.
"""

import functools
import math

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


@functools.lru_cache(4096)
def tile_count(width: int, height: int, settings: TileSettings) -> int:
    """Tiles of a picture of so many pixels, the thumbnail included."""
    columns, rows = choose_grid(
        width, height, settings.side, settings.min_tiles, settings.max_tiles
    )
    return columns * rows + (settings.use_thumbnail and columns * rows > 1)
