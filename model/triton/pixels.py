"""From a decoded picture to the encoder's input: resize, cut, normalise.

The resize is Pillow's bicubic one, bit for bit: weights in fixed point, and two passes, the first
of which is rounded to uint8. Only whole numbers are summed, so no device can round differently. The
rule: the cubic of Keys 1981 ("Cubic convolution interpolation for digital image processing") with
a = -1/2, widened by the scale where a picture shrinks; weights sum to 1.
"""

import functools
import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.transfer import to_device

# Pillow's: 32 bits less the 8 of a sample and 2 for sums of weights beyond 1.
_BITS = tl.constexpr(22)
_HALF = tl.constexpr(1 << 21)
_ROWS, _COLUMNS = 8, 128  # of the result, per program
_PATCHES = 4


@functools.lru_cache(64)
def weights(source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """How ``size`` samples are made of ``source``: where the window of each begins, int32 [size],
    and its fixed-point weights, int32 ``[taps, size]``; a window ends where only zeros follow."""
    scale = source / size
    widened = max(scale, 1.0)
    reach = 2.0 * widened
    center = (np.arange(size) + 0.5) * scale
    begin = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach + 0.5).astype(np.int64), source)
    places = begin + np.arange(2 * math.ceil(reach) + 1)[:, None]
    shares = _cubic((places - center + 0.5) * (1.0 / widened))
    shares[places >= end] = 0.0
    total = np.zeros(size)
    for share in shares:  # one by one, as the last bit of a sum depends on the order
        total += share
    shares *= 1.0 / total
    fixed = np.trunc(shares * (1 << _BITS.value) + np.where(shares < 0, -0.5, 0.5))
    return begin.astype(np.int32), np.ascontiguousarray(fixed.astype(np.int32))


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@triton.jit
def _resample(
    source_pointer,
    out_pointer,
    begin_pointer,
    weights_pointer,
    channel_stride,
    row_stride,
    column_stride,
    length,
    height,
    width,
    tile_height,
    tile_width,
    taps,
    DOWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One pass over one channel, down its columns or along its rows, from ``length`` samples to
    ``height`` or ``width``; written as tiles ``[n, 3, tile_height, tile_width]``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    channel = tl.program_id(2).to(tl.int64)
    inside = (row < height) & (column < width)
    line = source_pointer + channel * channel_stride
    if DOWN:
        index, size, step = row, height, row_stride
        line += column.to(tl.int64) * column_stride
    else:
        index, size, step = column, width, column_stride
        line += row.to(tl.int64) * row_stride
    begin = tl.load(begin_pointer + index, mask=index < size, other=0)
    total = tl.full([ROWS, COLUMNS], _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(weights_pointer + tap * size + index, mask=index < size, other=0)
        place = (begin + tap).to(tl.int64)
        sample = tl.load(line + place * step, mask=inside & (place < length), other=0)
        total += sample.to(tl.int32) * weight
    tile = (row // tile_height) * (width // tile_width) + column // tile_width
    line = ((tile * 3 + channel) * tile_height + row % tile_height) * tile_width
    sample = tl.minimum(tl.maximum(total >> _BITS, 0), 255).to(tl.uint8)
    tl.store(out_pointer + line + column % tile_width, sample, mask=inside)


def tiles(picture: Tensor, columns: int, rows: int, side: int, *, thumbnail: bool) -> Tensor:
    """Stretch uint8 ``[height, width, 3]`` to a grid and cut it: uint8 ``[count, 3, side, side]``.

    Tiles stand row by row; the whole picture as one tile follows if ``thumbnail`` is asked for.
    """
    count = columns * rows
    cut = picture.new_empty(count + thumbnail, 3, side, side)
    _resize(picture, cut[:count], columns * side, rows * side)
    if thumbnail:
        _resize(picture, cut[count:], side, side)
    return cut


def _resize(picture: Tensor, cut: Tensor, width: int, height: int) -> None:
    """``[source height, source width, 3]`` to tiles ``[n, 3, side, side]`` of width by height."""
    planes = picture.permute(2, 0, 1)
    _, source_height, source_width = planes.shape
    if source_height - height > max(2 * (source_width - width), 0):
        # The order is Pillow's since version 13; older ones always begin with the rows. It shows,
        # because samples are rounded in between.
        between = picture.new_empty(1, 3, height, source_width)
        _pass(planes, between, source_width, height, down=True)
        _pass(between[0], cut, width, height, down=False)
    else:
        between = picture.new_empty(1, 3, source_height, width)
        _pass(planes, between, width, source_height, down=False)
        _pass(between[0], cut, width, height, down=True)


def _pass(planes: Tensor, cut: Tensor, width: int, height: int, *, down: bool) -> None:
    """Resize one direction of ``[3, ...]`` to ``height`` or ``width``, cut as ``cut`` is."""
    length, size = (planes.shape[1], height) if down else (planes.shape[2], width)
    begin, factors = (to_device(part, planes.device) for part in weights(length, size))
    _resample[(triton.cdiv(height, _ROWS), triton.cdiv(width, _COLUMNS), 3)](
        planes,
        cut,
        begin,
        factors,
        *planes.stride(),
        length,
        height,
        width,
        *cut.shape[2:],
        len(factors),
        DOWN=down,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


@triton.jit
def _patches(
    tiles_pointer,
    mean_pointer,
    std_pointer,
    out_pointer,
    grid,
    side,
    SIDE: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``PATCHES`` patches of ``SIDE`` squared, 3 channels each."""
    tile, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * PATCHES + tl.arange(0, PATCHES)[:, None]
    index = tl.arange(0, BLOCK)[None, :]
    inside = (column < grid) & (index < 3 * SIDE * SIDE)
    channel, y, x = index // (SIDE * SIDE), index // SIDE % SIDE, index % SIDE
    place = ((tile * 3 + channel) * side + row * SIDE + y) * side + column * SIDE + x
    sample = tl.load(tiles_pointer + place, mask=inside, other=0).to(tl.float32)
    mean = tl.load(mean_pointer + channel, mask=inside, other=0.0)
    std = tl.load(std_pointer + channel, mask=inside, other=1.0)
    normal = tl.div_rn(sample - mean, std).to(out_pointer.dtype.element_ty)
    out = ((tile * grid + row) * grid + column) * 3 * SIDE * SIDE + index
    tl.store(out_pointer + out, normal, mask=inside)


def patches(tiles: Tensor, mean: Tensor, std: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """uint8 ``[T, 3, S, S]`` normalised and cut: ``[T, (S / side)^2, 3 * side^2]``, row by row.

    ``mean`` and ``std`` are fp32 [3], of samples from 0 to 255. A patch holds its channels one
    behind the other, as the weights of ``model.vision.Patch`` do.
    """
    tiles = tiles.contiguous()
    count, _, size, _ = tiles.shape
    grid, length = size // side, 3 * side * side
    out = torch.empty(count, grid * grid, length, dtype=dtype, device=tiles.device)
    _patches[(count, grid, triton.cdiv(grid, _PATCHES))](
        tiles,
        mean,
        std,
        out,
        grid,
        size,
        SIDE=side,
        PATCHES=_PATCHES,
        BLOCK=triton.next_power_of_2(length),
    )
    return out
