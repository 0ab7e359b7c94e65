"""All pictures of Pillow's own source distribution, and one picture in many encodings, through real
sandboxed workers: what comes out is what Pillow decodes outside of them."""

import asyncio
import base64
import collections
import dataclasses
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from preprocessing import MediaPart, MediaPipeline, TiledMedia
from preprocessing.images import FORMATS, Unreadable, look_picture, open_picture
from preprocessing.media import TileSettings
from preprocessing.tiling import tile
from tests.pictures import encode, lossless, stored, turned
from wire.errors import MediaRefused
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

GEOMETRY = VisionGeometry(tile_size=32, tokens_per_tile=4)
SETTINGS = TileSettings.of(GEOMETRY)
LIMIT = MediaSettings().max_image_pixels
DEADLINE = 60.0
# Seconds; a worker adds one, to be sure.
PROCESSOR_TIME = int(MediaSettings().media_timeout) - 1

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def media() -> Any:
    """Its clock is patient, for machines are busy; a job that takes more of a processor than the
    default has of the clock still ends its worker."""
    pipeline = MediaPipeline(
        MediaSettings(tile_cache_bytes=0, media_workers=2, media_timeout=DEADLINE)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._pool, "_processor_time", lambda _: PROCESSOR_TIME)
        await pipeline.start(GEOMETRY)
        yield pipeline
        await pipeline.close()


def part(encoded: bytes) -> MediaPart:
    return MediaPart("data:image/png;base64," + base64.b64encode(encoded).decode(), "picture")


async def load(media: MediaPipeline, encoded: bytes) -> TiledMedia:
    loaded = await media.load(part(encoded))
    assert isinstance(loaded, TiledMedia)
    return loaded


def outside(encoded: bytes) -> bytes | None:
    """The tiles as this process makes them; None for a refusal."""
    try:
        return tile(open_picture(encoded, LIMIT), SETTINGS)[0]
    except Unreadable:
        return None


def pillows_own(encoded: bytes) -> bytes | None:
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            return picture.convert("RGB").tobytes()
    except Exception:
        return None


# Pillow's own guards against files that take for ever; seconds each, also here.
SLOW = "timeout-"


@pytest.mark.filterwarnings("ignore")
async def test_every_file_of_pillows_tests_is_shown_as_pillow_shows_it_or_refused(
    media: MediaPipeline, corpus: list[Path]
) -> None:
    assert len(corpus) > 1000
    before = media.worker_pids
    outcomes: collections.Counter[str] = collections.Counter()

    async def check(path: Path) -> None:
        encoded = path.read_bytes()
        started = time.monotonic()
        try:
            inside: bytes | None = (await load(media, encoded)).tiles
            outcomes["shown"] += 1
        except MediaRefused as refused:
            inside = None
            outcomes[str(refused.code)] += 1
        # It may have waited for its turn behind another one.
        assert time.monotonic() - started < 3 * DEADLINE, path.name
        if not path.name.startswith(SLOW):
            assert inside == await asyncio.to_thread(outside, encoded), path.name

    queue = iter(corpus)

    async def in_turn() -> None:
        for path in queue:
            await check(path)

    await asyncio.gather(*(in_turn() for _ in range(3)))
    assert media.worker_pids == before
    assert media.stats.replaced == 0
    assert set(outcomes) <= {"shown", "invalid_media", "unsupported_media", "media_too_large"}
    assert outcomes["shown"] > 800


@pytest.mark.filterwarnings("ignore")
async def test_looking_and_the_reference_treatment_agree_with_pillow(corpus: list[Path]) -> None:
    for path in corpus:
        if path.name.startswith(SLOW):
            continue
        encoded = path.read_bytes()
        try:
            shown = open_picture(encoded, LIMIT, "reference")
        except Unreadable:
            assert pillows_own(encoded) is None, path.name
            continue
        assert shown.tobytes() == pillows_own(encoded), path.name
        facts = look_picture(encoded, LIMIT, "reference")
        assert (facts.width, facts.height) == shown.size, path.name


# one picture, many files

# No turn of it equals another.
ONE = Image.new("RGB", (200, 120), (30, 60, 200))
ONE.paste((220, 30, 30), (10, 10, 90, 50))
ONE.paste((250, 240, 40), (120, 70, 190, 110))
ENCODINGS = lossless(ONE)
LOSSY = {
    "JPEG": encode(ONE, "JPEG", quality=95, subsampling=0),
    "JPEG progressive": encode(ONE, "JPEG", quality=95, subsampling=0, progressive=True),
    "JPEG CMYK": encode(ONE.convert("CMYK"), "JPEG", quality=95),
    "WebP lossy": encode(ONE, "WEBP", quality=95),
    "AVIF": encode(ONE, "AVIF", quality=95, subsampling="4:4:4"),
    "HEIC": encode(ONE, "HEIF", quality=95, chroma=444),
    "HEIC in tiles": encode(ONE, "HEIF", quality=95, chroma=444, tile_size=64),
}


async def test_one_picture_in_many_lossless_encodings_has_the_same_tiles(
    media: MediaPipeline,
) -> None:
    expected = tile(ONE, SETTINGS)[0]
    assert len(ENCODINGS) >= 24
    for name, encoded in ENCODINGS.items():
        loaded = await load(media, encoded)
        assert (loaded.width, loaded.height) == ONE.size, name
        assert loaded.tiles == expected, name


@pytest.mark.parametrize("name", LOSSY)
async def test_a_lossy_encoding_changes_its_tiles_a_little(media: MediaPipeline, name: str) -> None:
    """Stated bound: 2 of 255 levels in the mean, and 48 at a hard edge."""
    expected = np.frombuffer(tile(ONE, SETTINGS)[0], np.uint8).astype(int)
    seen = np.frombuffer((await load(media, LOSSY[name])).tiles, np.uint8)
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).mean() <= 2
    assert np.abs(seen - expected).max() <= 48


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
async def test_one_picture_in_eight_orientations_has_the_same_tiles(
    media: MediaPipeline, kind: str
) -> None:
    expected = tile(ONE, SETTINGS)[0]
    options = {"lossless": True} if kind == "WEBP" else {}
    for orientation in range(1, 9):
        exif = turned(orientation)
        loaded = await load(media, encode(stored(ONE, orientation), kind, exif=exif, **options))
        assert loaded.tiles == expected, orientation
        assert (loaded.width, loaded.height) == ONE.size


NEARLY: dict[str, dict[str, Any]] = {
    "JPEG": {"subsampling": 0}, "AVIF": {"subsampling": "4:4:4"}, "HEIF": {"chroma": 444},
}  # fmt: skip


@pytest.mark.parametrize("kind", NEARLY)
async def test_one_photograph_in_eight_orientations_is_nearly_the_same(
    media: MediaPipeline, kind: str
) -> None:
    expected = np.frombuffer(tile(ONE, SETTINGS)[0], np.uint8).astype(int)
    for orientation in range(1, 9):
        exif = turned(orientation)
        encoded = encode(stored(ONE, orientation), kind, exif=exif, quality=95, **NEARLY[kind])
        loaded = await load(media, encoded)
        seen = np.frombuffer(loaded.tiles, np.uint8)
        assert (loaded.width, loaded.height) == ONE.size, orientation
        assert np.abs(seen - expected).mean() <= 2, orientation


async def test_fast_decoding_is_asked_for_and_never_of_the_reference_treatment() -> None:
    letters = Image.effect_noise((1600, 1600), 90).convert("RGB")
    asked = part(encode(letters, "JPEG"))
    exactly = dataclasses.replace(asked, treatment="reference")
    tiles: dict[str, list[bytes]] = {}
    for decoding in ("exact", "fast"):
        pipeline = MediaPipeline(MediaSettings(tile_cache_bytes=0, image_decoding=decoding))
        await pipeline.start(GEOMETRY)
        try:
            shown = [await pipeline.load(one) for one in (asked, exactly)]
        finally:
            await pipeline.close()
        tiles[decoding] = [one.tiles for one in shown if isinstance(one, TiledMedia)]
    normalized, reference = zip(tiles["exact"], tiles["fast"], strict=True)
    assert normalized[0] != normalized[1]
    assert reference[0] == reference[1] == normalized[0]
