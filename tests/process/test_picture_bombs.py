"""Files made to hurt, through real sandboxed workers: each gets one typed answer within its
deadline, in bounded memory, and the next picture is served."""

import asyncio
import base64
import gzip
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from preprocessing import MediaPart, MediaPipeline, TiledMedia
from preprocessing.images import FORMATS, open_picture
from preprocessing.media import TileSettings
from preprocessing.tiling import tile
from tests.pictures import encode, picture, png, png_chunk, promise, sample
from tests.sandboxed import deaths
from wire.errors import MediaRefused
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

GEOMETRY = VisionGeometry(tile_size=16, tokens_per_tile=1)
LIMIT = 20_000_000
TIMEOUT = 2.0  # for a bomb
DEADLINE = 60.0
# Resident bytes of a worker: its own code, and what one picture of LIMIT pixels may take.
MOST_MEMORY = 700 << 20


def part(encoded: bytes) -> MediaPart:
    return MediaPart("data:image/png;base64," + base64.b64encode(encoded).decode(), "picture")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def media() -> Any:
    pipeline = MediaPipeline(
        MediaSettings(
            tile_cache_bytes=0,
            max_image_pixels=LIMIT,
            max_media_bytes=16 << 20,
            max_video_bytes=1 << 20,
            media_timeout=DEADLINE,
        )
    )
    await pipeline.start(GEOMETRY)
    yield pipeline
    await pipeline.close()


async def shown(media: MediaPipeline, encoded: bytes, within: float = DEADLINE) -> TiledMedia | str:
    """The tiles, or the code of the refusal; afterwards the workers must be well."""
    before, died, timeouts = media.worker_pids, deaths(media), media.stats.kills["timeout"]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(media._pool, "_timeout", lambda _: within)
            async with asyncio.timeout(within + DEADLINE):
                loaded = await media.load(part(encoded))
        outcome: TiledMedia | str = loaded if isinstance(loaded, TiledMedia) else "a video"
    except MediaRefused as refused:
        outcome = str(refused.code)
    assert deaths(media) == died
    if media.stats.kills["timeout"] == timeouts:
        assert media.worker_pids == before
        for pid in before:
            assert resident(pid) < MOST_MEMORY
    else:  # the one that overran is gone, and its successor there
        async with asyncio.timeout(DEADLINE):
            while len(media.worker_pids) != len(before) or media.worker_pids == before:
                await asyncio.sleep(0.01)
    assert isinstance(await media.load(part(sample("PNG"))), TiledMedia)
    return outcome


def resident(pid: int) -> int:
    """Most bytes that a process has ever had in memory."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"PCD"}))
async def test_a_promise_of_many_pixels_is_refused_from_the_header(
    media: MediaPipeline, kind: str
) -> None:
    side = 16_000 if kind in {"WEBP", "AVIF"} else 30_000
    assert await shown(media, promise(kind, side, side)) == "media_too_large"


ZEROS = zlib.compress(bytes(100 << 20), 9)  # a thousandth of what comes out


def gif_frames(count: int) -> bytes:
    frame = b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(6) + frame * count + b";"


def tiff(tags: list[tuple[int, int, int, int]], after: int = 0, tail: bytes = b"") -> bytes:
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + struct.pack("<I", after) + tail


def tiff_tags(width: int, height: int, compression: int, **more: int) -> list[Any]:
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 200, 277: 1,
            278: height, 279: 40}  # fmt: skip
    tags |= {int(number[1:]): value for number, value in more.items()}
    return [(number, 4, 1, value) for number, value in sorted(tags.items())]


def progressive_scans(count: int) -> bytes:
    """A JPEG whose last scan, which refines every block, comes again and again."""
    encoded = encode(Image.new("L", (4000, 4000), 80), "JPEG", progressive=True)
    last = encoded.rindex(b"\xff\xda")
    return encoded[:last] + encoded[last:-2] * count + b"\xff\xd9"


def jpeg2000_tiles() -> bytes:
    """Four million tiles of one pixel."""
    file = encode(picture(), "JPEG2000", no_jp2=True)
    at = file.index(b"\xff\x51") + 4
    sizes = struct.pack(">HIIIIIIII", 0, 2000, 2000, 0, 0, 1, 1, 0, 0)
    return file[:at] + sizes + file[at + len(sizes) :]


def psd_layers(count: int) -> bytes:
    layer = (
        struct.pack(">iiiiH", 0, 0, 1 << 30, 1 << 30, 1) + b"\0\0\0\0\0\1" + b"8BIMnorm" + bytes(8)
    )
    layers = struct.pack(">h", count) + layer * count
    info = struct.pack(">I", len(layers)) + layers
    block = struct.pack(">I", len(info)) + info
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 32, 48, 8, 3) + bytes(8)
    return head + block + b"\0\0" + bytes(3 * 48 * 32)


def ico_entries(count: int) -> bytes:
    """Every entry is the same PNG, which has more pixels than its entry says."""
    inside = promise("PNG", 30_000, 30_000)
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(inside), 6 + 16 * count)
    return b"\0\0\1\0" + struct.pack("<H", count) + entry * count + inside


def fits_gzip() -> bytes:
    cards = ["XTENSION= 'BINTABLE'", "SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 0",
             "NAXIS2  = 0", "ZIMAGE  = T", "ZCMPTYPE= 'GZIP_1  '", "ZBITPIX = 8", "ZNAXIS  = 2",
             "ZNAXIS1 = 9", "ZNAXIS2 = 9", "END"]  # fmt: skip
    cards[0], cards[1] = cards[1], cards[0]
    head = "".join(card.ljust(80) for card in cards).encode().ljust(2880)
    return head + 20 * gzip.compress(bytes(100 << 20), 1)


def dripping(data: bytes) -> bytes:
    """A GIF whose picture is cut into the smallest pieces, and never comes to an end."""
    return promise("GIF", 900, 900)[:-1] + b"\x01\0" * (len(data) // 2)


def webp_frames(count: int) -> bytes:
    one = promise("WEBP", 16, 16)[12:]
    frame = struct.pack("<6s6s3s1s", bytes(6), b"\x0f\0\0\x0f\0\0", b"\1\0\0", b"\0") + one
    chunk = b"ANMF" + struct.pack("<I", len(frame)) + frame
    body = (
        b"VP8X" + struct.pack("<IB3x", 10, 2) + b"\x0f\0\0\x0f\0\0"
        + b"ANIM" + struct.pack("<IIH", 6, 0, 0) + chunk * count
    )  # fmt: skip
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def avif_grid() -> bytes:
    """The picture's item becomes a grid of 256 x 256 tiles, each of which is that item again."""
    file = encode(picture(), "AVIF")
    return file.replace(b"av01", b"grid")


BOMBS = {
    "PNG profile": lambda: png(1, 1, 8, 0, b"\0\0", png_chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "PNG text": lambda: png(1, 1, 8, 0, b"\0\0", *[png_chunk(b"zTXt", b"a\0\0" + ZEROS)] * 40),
    "PNG international text": lambda: png(
        1, 1, 8, 0, b"\0\0", *[png_chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)] * 40
    ),
    "PNG more rows than promised": lambda: png(1, 1, 8, 0, bytes(100 << 20)),
    "PNG a million chunks": lambda: png(1, 1, 8, 0, b"\0\0", png_chunk(b"teXt", b"") * 1_000_000),
    "APNG two thousand million frames": lambda: png(
        1, 1, 8, 0, b"\0\0", png_chunk(b"acTL", struct.pack(">II", 0x7FFFFFFF, 0))
    ),
    "GIF a million frames": lambda: gif_frames(1_000_000),
    "GIF in drops": lambda: dripping(bytes(8 << 20)),
    "TIFF a strip of four gigabytes": lambda: tiff(tiff_tags(9, 9, 1, t279=0xFFFFFFFF), 0),
    "TIFF a strip that unpacks to more": lambda: tiff(
        tiff_tags(9, 9, 8, t279=len(ZEROS)), 0, bytes(78) + ZEROS
    ),
    "TIFF a tag of four gigabytes": lambda: tiff([*tiff_tags(9, 9, 1), (700, 1, 0xFFFFFFFF, 8)]),
    "TIFF sixty thousand tags": lambda: tiff(
        [*tiff_tags(9, 9, 1), *((n // 3 + 40_000, 12, 1 << 20, 8) for n in range(60_000))]
    ),
    "TIFF pages in a circle": lambda: tiff(tiff_tags(48, 32, 1, t279=1536), 8, bytes(2000)),
    "TIFF exif in a circle": lambda: tiff(
        tiff_tags(48, 32, 1, t279=1536, t34665=8), 0, bytes(2000)
    ),
    "ICO sixty thousand entries": lambda: ico_entries(60_000),
    "JPEG a hundred thousand scans": lambda: progressive_scans(100_000),
    "JPEG 2000 four million tiles": jpeg2000_tiles,
    "PSD thirty thousand layers": lambda: psd_layers(30_000),
    "FITS gzip": fits_gzip,
    "WebP a hundred thousand frames": lambda: webp_frames(100_000),
    "AVIF grid": avif_grid,
    "XPM four thousand million colours": lambda: sample("XPM").replace(b" 2 1", b" 4000000000 1"),
    "PPM in words": lambda: b"P3 4000 4000 65535\n" + b"1 " * 4_000_000,
    "QOI runs": lambda: promise("QOI", 4000, 4000) + b"\xfd" * 300_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_costs_its_deadline_at_most(media: MediaPipeline, name: str) -> None:
    encoded = BOMBS[name]()
    assert len(encoded) <= 16 << 20
    outcome = await shown(media, encoded, TIMEOUT)
    if isinstance(outcome, TiledMedia):
        assert outcome.width * outcome.height <= LIMIT
    else:
        assert outcome in {"media_too_large", "invalid_media", "unsupported_media", "media_timeout"}


# what is cut off, glued together or renamed


def cuts(length: int) -> Iterator[int]:
    """The first bytes one by one, then places spread over the rest."""
    yield from range(0, min(length, 24), 3)
    yield from sorted(random.Random(length).sample(range(24, length), min(14, length - 24)))


@pytest.mark.parametrize("kind", FORMATS)
async def test_a_cut_file_is_refused_or_whole(media: MediaPipeline, kind: str) -> None:
    """Whole: nothing but padding or a mark at the end was cut off."""
    encoded = sample(kind)
    whole = await media.load(part(encoded))
    refused = 0
    for end in cuts(len(encoded)):
        outcome = await shown(media, encoded[:end]) if end else "invalid_media"
        refused += isinstance(outcome, str)
        if isinstance(outcome, TiledMedia):
            assert outcome.tiles == whole.tiles, f"cut at {end} of {len(encoded)}"
    assert refused > 8


ZIP = b"PK\3\4" + bytes(26) + b"PK\5\6" + bytes(18)
POLYGLOTS: dict[str, tuple[bytes, bytes | None]] = {
    # name -> (the file, the picture in it that is shown, if one is)
    "PNG and ZIP": (sample("PNG") + ZIP, sample("PNG")),
    "GIF and script": (sample("GIF") + b"=1;alert(1)", sample("GIF")),
    "JPEG and page": (
        b"\xff\xd8\xff\xfe\0\x2a<html><script>alert(1)</script></html>  "[:46].ljust(46)
        + sample("JPEG")[2:],
        sample("JPEG"),
    ),
    "JPEG and JPEG": (sample("JPEG") + encode(Image.new("RGB", (9, 9)), "JPEG"), sample("JPEG")),
    "PNG and PNG": (sample("PNG") + promise("PNG", 30_000, 30_000), sample("PNG")),
    "PDF and JPEG": (b"%PDF-1.7\n1 0 obj\nstream\n" + sample("JPEG"), None),
    "ZIP and PNG": (ZIP + sample("PNG"), None),
    "page and GIF": (b"<html></html>" + sample("GIF"), None),
    "EPS and TIFF": (b"\xc5\xd0\xd3\xc6" + bytes(28) + sample("TIFF"), None),
    "program and BMP": (b"\x7fELF" + sample("BMP"), None),
}


@pytest.mark.parametrize("name", POLYGLOTS)
async def test_of_two_files_in_one_the_picture_at_the_front_counts(
    media: MediaPipeline, name: str
) -> None:
    file, inside = POLYGLOTS[name]
    outcome = await shown(media, file)
    if inside is None:
        assert outcome == "unsupported_media"
    else:
        assert isinstance(outcome, TiledMedia)
        assert outcome.tiles == tile(open_picture(inside, LIMIT), TileSettings.of(GEOMETRY))[0]


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "AVIF"])
async def test_a_wrong_type_changes_nothing(media: MediaPipeline, kind: str) -> None:
    body = base64.b64encode(sample(kind)).decode()
    for mime in ("image/jpeg", "image/x-eps", "image/svg+xml"):
        loaded = await media.load(MediaPart(f"data:{mime};base64,{body}", "picture"))
        assert isinstance(loaded, TiledMedia)
        right = await media.load(part(sample(kind)))
        assert loaded.tiles == right.tiles
