"""Videos whose every frame says which one it is, made with the ffmpeg of the imageio-ffmpeg wheel.

A frame is a grid of 4 x 4 cells: red, green and blue in three corners say which way is up, and
the eight cells in the middle rows are the bits of the frame's number, white for 1. ``number`` and
``turned`` read them back from any decoded picture that shows a whole frame.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
_CELLS = 4


def frame(number: int, width: int = 64, height: int = 64) -> Image.Image:
    """The picture of frame ``number``, 0..255."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    small = Image.new("RGB", (_CELLS, _CELLS), (128, 128, 128))
    for at, value in enumerate(bits):
        small.putpixel((at % 4, 1 + at // 4), (value, value, value))
    for at, colour in (((0, 0), RED), ((3, 0), GREEN), ((0, 3), BLUE)):
        small.putpixel(at, colour)
    return small.resize((width, height), Image.Resampling.NEAREST)


def _cell(picture: Image.Image, column: int, row: int) -> tuple[int, int, int]:
    at = ((2 * column + 1) * picture.width // 8, (2 * row + 1) * picture.height // 8)
    red, green, blue = picture.getpixel(at)  # type: ignore[misc]
    return int(red), int(green), int(blue)


def number(picture: Image.Image) -> int:
    """Which frame an upright picture shows. Raises AssertionError when it cannot be read."""
    found = 0
    for bit in range(8):
        level = sum(_cell(picture, bit % 4, 1 + bit // 4)) / 3
        assert level < 80 or level > 175, f"bit {bit} is grey: {level}"
        found |= (level > 127) << bit
    return found


def colours(picture: Image.Image) -> list[tuple[int, int, int]]:
    """The corners that are red, green and blue in an upright picture."""
    return [_cell(picture, 0, 0), _cell(picture, 3, 0), _cell(picture, 0, 3)]


def is_upright(picture: Image.Image) -> bool:
    """Whether red, green and blue stand where they belong."""
    return [max(range(3), key=colour.__getitem__) for colour in colours(picture)] == [0, 1, 2]


def ffmpeg(*arguments: str | Path, given: bytes | None = None) -> bytes:
    """Run the encoder; its standard output."""
    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin", *map(str, arguments)]
        if given is None
        else [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)],
        input=given,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def encode(
    target: Path,
    options: Sequence[str],
    count: int = 30,
    size: tuple[int, int] = (64, 64),
    rate: str = "25",
    inputs: Sequence[str] = (),
    pictures: Sequence[Image.Image] | None = None,
) -> bytes:
    """A video of ``count`` frames in the container that the name of ``target`` says."""
    shown = pictures or [frame(at, *size) for at in range(count)]
    mode = shown[0].mode
    raw = b"".join(picture.tobytes() for picture in shown)
    ffmpeg(
        *inputs, "-f", "rawvideo", "-pix_fmt", {"RGB": "rgb24", "RGBA": "rgba"}[mode],
        "-s", f"{shown[0].width}x{shown[0].height}", "-r", rate, "-i", "-",
        "-fflags", "+bitexact", "-threads", "1", *options, target, given=raw,
    )  # fmt: skip
    return target.read_bytes()
