"""Pictures per second from encoded bytes to tiles, beside the reference's way on the same core.

    python -m benchmarks.media [--seconds 3] [--out FILE]

On JPEG, PNG and WebP pictures of 1 and 12 megapixels and JPEGs of 4K and of 48 megapixels, all as
12 tiles and a thumbnail (4K as 8). Figures are processor time, all processes together, so that
other work on the machine disturbs them little; pictures per second are per core, and "ratio" is
how many times those of the reference they are.

- ``reference``: Pillow, then every tile scaled and normalised to float32 on the CPU, as the
  model's own code does it;
- ``ours``: the decode worker's function, uint8 tiles, in this process (which takes its memory
  anew for every picture, where a worker keeps it);
- ``Pillow``: the same where the compiled resize is not installed;
- ``header``: the same worker's look at size and orientation, as a preview of the cost needs it;
- ``fast``: as ``ours``, with ``image_decoding`` "fast"; JPEG only;
- ``one tile``, ``fast, one tile``: the same for ``detail: low``;
- ``pipeline``: ``MediaPipeline.load`` with one worker: base64, sandbox, sockets and digest;
- ``fetched``: the same from a web server of this machine, whose own time does not count: a
  connection, HTTP, and all that is checked of an address.

Prints a table and writes JSON.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL
from msgspec import structs
from PIL import Image

from preprocessing import MediaPart, MediaPipeline, bicubic
from preprocessing.grid import choose_grid
from preprocessing.media import LookJob, PictureFacts, Tiled, TileJob, TileSettings
from preprocessing.worker import answer
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

GEOMETRY = VisionGeometry(tile_size=448, tokens_per_tile=256)
SETTINGS = TileSettings.of(GEOMETRY)
SIZES = {"1 MP": (1152, 864), "4K": (3840, 2160), "12 MP": (4032, 3024), "48 MP": (8064, 6048)}
MAX_PIXELS = MediaSettings().max_image_pixels


def photograph(width: int, height: int) -> bytes:
    """A JPEG with smooth areas, edges and noise; about as large as a camera's."""
    draw = np.random.default_rng(7)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [
        128 + 70 * np.sin(x / (90 + 9 * k) + y / (130 - 7 * k)) + 25 * ((x // 61 + y // 47) % 2)
        for k in range(3)
    ]
    noisy = np.stack(planes, -1) + draw.normal(0, 5, (height, width, 1)).astype(np.float32)
    sink = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def reference(encoded: bytes) -> np.ndarray[Any, Any]:
    """float32 ``[T, 3, 448, 448]``, normalised, as the published code makes them."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    side = SETTINGS.side
    columns, rows = choose_grid(*picture.size, side, SETTINGS.min_tiles, SETTINGS.max_tiles)
    resized = picture.resize((columns * side, rows * side))
    tiles = []
    for index in range(columns * rows):
        left, top = index % columns * side, index // columns * side
        tiles.append(resized.crop((left, top, left + side, top + side)))
    if len(tiles) > 1:
        tiles.append(picture.resize((side, side)))
    mean, std = np.float32(GEOMETRY.mean), np.float32(GEOMETRY.std)
    floats = [(np.asarray(one, np.float32) / np.float32(255) - mean) / std for one in tiles]
    return np.stack([one.transpose(2, 0, 1) for one in floats])


def encodings(photo: bytes, size: str) -> dict[str, bytes]:
    """The photograph as it is, and as other files of the same pixels."""
    files = {"JPEG": photo}
    if size in ("1 MP", "12 MP"):
        with Image.open(io.BytesIO(photo)) as picture:
            for kind, options in {"PNG": {}, "WebP": {"quality": 90}}.items():
                sink = io.BytesIO()
                picture.save(sink, kind, **options)
                files[kind] = sink.getvalue()
    return files


def ours(encoded: bytes, settings: TileSettings = SETTINGS) -> bytes:
    message, buffers = answer(
        TileJob(settings=settings, max_pixels=MAX_PIXELS, seconds=60), bytearray(encoded)
    )
    assert isinstance(message, Tiled)
    return bytes(memoryview(buffers[0]))


def by_pillow(encoded: bytes) -> bytes:
    with mock.patch.object(bicubic, "_kernel", None):
        return ours(encoded)


def header(encoded: bytes) -> object:
    look = LookJob(
        kind="image", treatment="normalized", max_pixels=MAX_PIXELS, max_frames=1, seconds=60
    )
    message, _ = answer(look, bytearray(encoded))
    assert isinstance(message, PictureFacts)
    return message


def processor_time(pids: Sequence[int]) -> float:
    """Seconds used by this process and by ``pids``, which Linux tells in hundredths."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(
    function: Callable[[], object], seconds: float, pids: Sequence[int] = ()
) -> dict[str, float]:
    """Call for a while; mean processor time and the shortest time on the clock."""
    function()
    times = []
    used = -processor_time(pids)
    while sum(times) < seconds or len(times) < 5:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    used = (used + processor_time(pids)) / len(times)
    return {
        "pictures_per_second_per_core": round(1 / used, 2),
        "processor_ms": round(used * 1e3, 2),
        "best_wall_ms": round(min(times) * 1e3, 2),
        "runs": len(times),
    }


@contextlib.contextmanager
def site() -> Iterator[tuple[Path, str]]:
    """A folder, and the URL under which another process serves it."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
        with subprocess.Popen(
            words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stdout is not None
            found = re.search(r"port (\d+)", server.stdout.readline())
            assert found is not None
            yield Path(folder), f"http://127.0.0.1:{found[1]}/"
            server.terminate()


def through_pipeline(url: str, seconds: float) -> dict[str, float]:
    part = MediaPart(url, "picture")
    settings = MediaSettings(
        media_workers=1, tile_cache_bytes=0, allow_private_media=True, allowed_media_ports=()
    )
    with asyncio.Runner() as runner:
        media = MediaPipeline(settings)
        runner.run(media.start(GEOMETRY))
        try:
            return measure(lambda: runner.run(media.load(part)), seconds, media.worker_pids)
        finally:
            runner.run(media.close())


def measure_all(
    name: str, kind: str, encoded: bytes, seconds: float, folder: Path, address: str
) -> dict[str, Any]:
    """All ways on one file, printed as they come."""
    low = structs.replace(SETTINGS, max_tiles=1)
    fast = [structs.replace(settings, fast=True) for settings in (SETTINGS, low)]
    ways: dict[str, Callable[[], object]] = {
        "reference": lambda: reference(encoded),
        "ours": lambda: ours(encoded),
        "Pillow": lambda: by_pillow(encoded),
        "header": lambda: header(encoded),
        "one tile": lambda: ours(encoded, low),
    }
    if kind == "JPEG":
        ways["fast"] = lambda: ours(encoded, fast[0])
        ways["fast, one tile"] = lambda: ours(encoded, fast[1])
    row: dict[str, Any] = {"encoded_bytes": len(encoded), "tiles": len(reference(encoded))}
    for way, function in ways.items():
        row[way] = measure(function, seconds)
    url = "data:image/png;base64," + base64.b64encode(encoded).decode()
    row["pipeline"] = through_pipeline(url, seconds)
    (folder / "picture").write_bytes(encoded)
    row["fetched"] = through_pipeline(address + "picture", seconds)
    for way in (*ways, "pipeline", "fetched"):
        figures = row[way]
        figures["ratio"] = round(row["reference"]["processor_ms"] / figures["processor_ms"], 2)
        print(
            f"{name:>10}  {way:<15} {figures['pictures_per_second_per_core']:8.2f} pictures/s"
            f"  {figures['processor_ms']:8.2f} ms of processor time  {figures['ratio']:6.2f}",
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--only", default="", help="names that hold this, for example JPEG")
    parser.add_argument("--out", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "pictures": {},
    }
    with site() as (folder, address):
        for named, size in SIZES.items():
            for kind, encoded in encodings(photograph(*size), named).items():
                name = f"{named} {kind}"
                if arguments.only in name:
                    row = measure_all(name, kind, encoded, arguments.seconds, folder, address)
                    results["pictures"][name] = row
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    else:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
