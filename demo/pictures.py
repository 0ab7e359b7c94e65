"""Synthetic pictures and everything that is known about them.

A ``Scene`` says what is where; ``render`` draws it with Pillow; ``labels`` gives the truth for
every patch of every tile, which is what the vision encoder is taught first. All randomness comes
from the generator that is handed in, so a seed decides every pixel.
"""

import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocessing.grid import choose_grid

TILE = 112
PATCH = 14
CELLS = TILE // PATCH
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (220, 35, 35),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 215, 45),
    "orange": (245, 140, 25),
    "purple": (135, 50, 165),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
PURE = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
NAMES = tuple(COLOURS)
PITCH = 0.8
"""Distance of printed digits, as a share of the font size."""
Rgb = tuple[int, int, int]


@dataclass
class Thing:
    """One shape: centre and radius in pixels of the picture."""

    shape: str
    colour: str
    x: float
    y: float
    r: float
    rgb: Rgb = (0, 0, 0)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        return self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r


@dataclass
class Glyph:
    """One printed character and its box."""

    text: str
    box: tuple[float, float, float, float]


@dataclass
class Scene:
    """A picture before it is drawn."""

    width: int
    height: int
    background: Rgb
    things: list[Thing] = field(default_factory=list)
    number: str = ""
    glyphs: list[Glyph] = field(default_factory=list)
    ink: Rgb = (0, 0, 0)
    size: int = 0
    """Font size of the glyphs."""


def far(a: Rgb, b: Rgb) -> bool:
    """Whether two colours are told apart easily."""
    return sum(abs(i - j) for i, j in zip(a, b, strict=True)) > 150


def background(rng: np.random.Generator) -> Rgb:
    kind = rng.random()
    if kind < 0.45:
        return (255, 255, 255)
    if kind < 0.6:
        level = int(rng.integers(170, 256))
        return (level, level, level)
    if kind < 0.7:
        level = int(rng.integers(0, 60))
        return (level, level, level)
    base = rng.integers(120, 256, 3)
    return (int(base[0]), int(base[1]), int(base[2]))


def tint(rng: np.random.Generator, colour: str) -> Rgb:
    if rng.random() < 0.3:
        return PURE[colour]
    jitter = rng.integers(-22, 23, 3)
    r, g, b = (int(min(255, max(0, c + j))) for c, j in zip(COLOURS[colour], jitter, strict=True))
    return r, g, b


def place(
    rng: np.random.Generator, scene: Scene, count: int, names: list[tuple[str, str]] | None = None
) -> None:
    """Put ``count`` shapes that do not touch each other into ``scene``."""
    side = min(scene.width, scene.height)
    top = {0: 0.3, 1: 0.36, 2: 0.24, 3: 0.2, 4: 0.17, 5: 0.15}.get(count, 0.13)
    for index in range(count):
        for _ in range(60):
            if names is not None:
                shape, colour = names[index]
            else:
                shape = SHAPES[int(rng.integers(len(SHAPES)))]
                colour = NAMES[int(rng.integers(len(NAMES)))]
            rgb = tint(rng, colour)
            if not far(rgb, scene.background):
                if names is not None:
                    scene.background = background(rng)
                continue
            r = side * float(rng.uniform(0.09, top))
            x = float(rng.uniform(r + 2, scene.width - r - 2))
            y = float(rng.uniform(r + 2, scene.height - r - 2))
            if all(math.hypot(x - o.x, y - o.y) > (r + o.r) * 1.25 for o in scene.things):
                scene.things.append(Thing(shape, colour, x, y, r, rgb))
                break


def corners(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Outline of a shape as a polygon."""
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    if shape == "cross":
        w = r * 0.36
        return [
            (x - w, y - r),
            (x + w, y - r),
            (x + w, y - w),
            (x + r, y - w),
            (x + r, y + w),
            (x + w, y + w),
            (x + w, y + r),
            (x - w, y + r),
            (x - w, y + w),
            (x - r, y + w),
            (x - r, y - w),
            (x - w, y - w),
        ]
    points = []
    for k in range(10):
        radius = r if k % 2 == 0 else r * 0.42
        angle = math.pi * k / 5 - math.pi / 2
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return points


def write_number(
    rng: np.random.Generator,
    scene: Scene,
    text: str,
    size: float,
    area: tuple[float, float, float, float] | None = None,
) -> None:
    """Print ``text`` somewhere in the scene, or in an area of it, ``size`` pixels high."""
    scene.number = text
    font = ImageFont.load_default(int(size))
    x0, y0, x1, y1 = area or (0, 0, scene.width, scene.height)
    pitch = size * PITCH
    left = float(rng.uniform(x0 + 2, max(x0 + 3.0, x1 - pitch * len(text) - 2)))
    top = float(rng.uniform(y0, max(y0 + 1.0, y1 - size * 1.15)))
    for index, char in enumerate(text):
        x = left + index * pitch
        box = font.getbbox(char)
        scene.glyphs.append(Glyph(char, (x + box[0], top + box[1], x + box[2], top + box[3])))
    scene.ink = next(
        ink
        for ink in [tint(rng, NAMES[int(rng.integers(8))]) for _ in range(20)]
        + [(0, 0, 0), (255, 255, 255)]
        if far(ink, scene.background)
    )
    scene.size = int(size)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene; half of the pictures are anti-aliased, some are noisy or were JPEGs."""
    scale = 2 if scene.width * scene.height < 60_000 and rng.random() < 0.6 else 1
    w, h = scene.width * scale, scene.height * scale
    if rng.random() < 0.12:
        other = np.array(scene.background) + rng.integers(-40, 41, 3)
        ramp = (
            np.linspace(0, 1, w)[None, :, None]
            if rng.random() < 0.5
            else np.linspace(0, 1, h)[:, None, None]
        )
        array = np.array(scene.background) * (1 - ramp) + np.clip(other, 0, 255) * ramp
        picture = Image.fromarray(np.broadcast_to(array, (h, w, 3)).astype(np.uint8).copy())
    else:
        picture = Image.new("RGB", (w, h), scene.background)
    pen = ImageDraw.Draw(picture)
    outline = rng.random() < 0.12
    for thing in scene.things:
        x, y, r = thing.x * scale, thing.y * scale, thing.r * scale
        edge: dict[str, Any] = {"fill": thing.rgb}
        if outline and far(thing.rgb, (0, 0, 0)) and far(scene.background, (0, 0, 0)):
            edge = {"fill": thing.rgb, "outline": (0, 0, 0), "width": scale}
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), **edge)
        elif thing.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), **edge)
        else:
            pen.polygon(corners(thing.shape, x, y, r), **edge)
    if scene.glyphs:
        font = ImageFont.load_default(scene.size * scale)
        for glyph in scene.glyphs:
            x0, y0, _, _ = ImageFont.load_default(scene.size).getbbox(glyph.text)
            place_at = ((glyph.box[0] - x0) * scale, (glyph.box[1] - y0) * scale)
            pen.text(place_at, glyph.text, fill=scene.ink, font=font)
    if scale > 1:
        picture = picture.reduce(scale)
    kind = rng.random()
    if kind < 0.12:
        noise = rng.normal(0, float(rng.uniform(2, 14)), (scene.height, scene.width, 1))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    elif kind < 0.22:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(50, 95)))
        picture = Image.open(buffer).convert("RGB")
    return picture


def cut(picture: Image.Image, most: int) -> tuple[np.ndarray, int, int]:
    """The reference tiling at this model's tile side: uint8 ``[tiles, 3, 112, 112]``, grid."""
    columns, rows = choose_grid(*picture.size, TILE, 1, most)
    whole = np.asarray(picture.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC))
    tiles = whole.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, 3, TILE, TILE)
    if columns * rows > 1:
        small = np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, small.transpose(2, 0, 1)[None]])
    return np.ascontiguousarray(tiles), columns, rows


BOX_BINS = 26
"""Box edges are told in steps of 1/25 of the tile, which answers write as multiples of 40."""
HEADS = {
    "shape": len(SHAPES) + 2,
    "colour": len(NAMES) + 1,
    "digit": 11,
    "left": BOX_BINS,
    "top": BOX_BINS,
    "right": BOX_BINS,
    "bottom": BOX_BINS,
    "cell": 9,
    "rank x": 5,
    "rank y": 5,
    "same shape": 6,
    "same colour": 6,
    "total": 6,
}
LEGIBLE = 12
"""Height in pixels of its tile from which a digit can be read."""
_CENTRES = (np.arange(CELLS) + 0.5) * PATCH


@dataclass
class Mark:
    """A thing or a digit as one tile shows it: box in pixels of the tile, class numbers."""

    box: tuple[float, float, float, float]
    shape: int
    colour: int = -1
    digit: int = -1
    """0: too small to read."""

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def patches(self) -> np.ndarray:
        x0, y0, x1, y1 = self.box
        across = (x0 - 4 < _CENTRES) & (x1 + 4 > _CENTRES)
        down = (y0 - 4 < _CENTRES) & (y1 + 4 > _CENTRES)
        return (down[:, None] & across[None, :]).reshape(-1)


def labels(scene: Scene, columns: int, rows: int) -> np.ndarray:
    """Truth per patch: int64 ``[tiles, 64, len(HEADS)]``; -1 where there is nothing to say.

    Every label is local to its tile: the encoder cannot know which tile it looks at.
    """
    views = [(column, row, columns, rows) for row in range(rows) for column in range(columns)]
    if len(views) > 1:
        views.append((0, 0, 1, 1))
    out = np.empty((len(views), CELLS * CELLS, len(HEADS)), np.int64)
    for index, (column, row, wide, high) in enumerate(views):
        sx, sy = TILE * wide / scene.width, TILE * high / scene.height

        def here(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
            left, top = column * TILE, row * TILE  # noqa: B023
            x0, y0, x1, y1 = box
            return x0 * sx - left, y0 * sy - top, x1 * sx - left, y1 * sy - top  # noqa: B023

        marks = [
            Mark(here(t.box), SHAPES.index(t.shape) + 1, NAMES.index(t.colour) + 1)
            for t in scene.things
        ]
        for glyph in scene.glyphs:
            box = here(glyph.box)
            legible = box[3] - box[1] >= LEGIBLE
            marks.append(Mark(box, len(SHAPES) + 1, digit=int(glyph.text) + 1 if legible else 0))
        out[index] = tile_labels(marks)
    return out


def tile_labels(marks: list[Mark]) -> np.ndarray:
    """Truth of one tile: int64 ``[64, len(HEADS)]``. Ranks and counts are of what it holds."""
    out = np.full((CELLS * CELLS, len(HEADS)), -1, np.int64)
    out[:, :2] = 0
    held = [m for m in marks if all(0 <= c < TILE for c in m.centre)]
    digits = any(m.digit >= 0 for m in marks)
    out[:, -1] = -1 if digits else min(5, len(held))
    for mark in marks:
        inside = mark.patches()
        if not inside.any():
            continue
        edges = [round(min(1.0, max(0.0, v / TILE)) * (BOX_BINS - 1)) for v in mark.box]
        u, v = (c / TILE for c in mark.centre)
        row = [mark.shape, mark.colour, mark.digit, *edges, -1, -1, -1, -1, -1]
        if mark in held:
            clear = min(abs(c - line) for c in (u, v) for line in (1 / 3, 2 / 3)) > 0.02
            row[7] = int(v * 3) * 3 + int(u * 3) if clear else -1
            row[8] = min(4, sum(m.centre[0] < mark.centre[0] for m in held))
            row[9] = min(4, sum(m.centre[1] < mark.centre[1] for m in held))
            row[10] = min(5, sum(m.shape == mark.shape for m in held))
            row[11] = min(5, sum(m.colour == mark.colour for m in held))
        out[inside, :-1] = row
    return out
