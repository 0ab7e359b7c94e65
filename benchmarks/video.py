"""Seconds of video per second and core, from the encoded file to tiles, beside the reference's way.

    python -m benchmarks.video [--runs 3] [--out FILE]

32 frames of H.264 clips of 10 and 60 seconds at 30 frames per second, 720p and 1080p, with the
encoder's own defaults (a key frame every 250 frames, three B-frames). Figures are processor time
of this process, the least of several runs that take turns, so that other work on the machine
disturbs them little. The pictures are compared too.

- ``pyav``: what the decode worker does (count, look, decode, convert, tile), read by PyAV;
- ``decord``: the same, read by decord, which is what ``--video-reader decord`` sets;
- ``reference``: ``load_video`` of the model's card: decord, Pillow, float32 on the CPU.

Needs ``imageio-ffmpeg`` and ``decord``. Prints a table and writes JSON.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import decord
import imageio_ffmpeg
import numpy as np
from PIL import Image

from preprocessing import videos
from preprocessing.media import FrameChoice, Frames, FramesJob, TileSettings
from preprocessing.worker import answer
from wire.settings import MediaSettings

FRAMES, RATE, SIDE = 32, 30, 448
SIZES = {"720p": "1280x720", "1080p": "1920x1080"}
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


def clip(size: str, seconds: int, path: Path) -> bytes:
    """A moving pattern with a little noise, as large as a phone's video would be."""
    source = f"testsrc2=size={size}:rate={RATE}:duration={seconds},noise=alls=6:allf=t"
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source,
         "-c:v", "libx264", "-preset", "veryfast", "-bf", "3", "-crf", "25",
         "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)],
        check=True,
    )  # fmt: skip
    return path.read_bytes()


def reference(path: Path) -> np.ndarray[Any, Any]:
    """float32 ``[32, 3, 448, 448]``, normalised, as the published code makes them."""
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    last, fps = len(reader) - 1, float(reader.get_avg_fps())
    start, end = max(0, round(-100000 * fps)), min(round(100000 * fps), last)
    segment = float(end - start) / FRAMES
    tiles = []
    for k in range(FRAMES):
        index = int(start + segment / 2 + np.round(segment * k))
        picture = Image.fromarray(reader[index].asnumpy()).convert("RGB")
        pixels = np.asarray(picture.resize((SIDE, SIDE)), np.float32) / np.float32(255)
        tiles.append(((pixels - MEAN) / STD).transpose(2, 0, 1))
    return np.stack(tiles)


def ours(encoded: bytes, reader: str) -> np.ndarray[Any, Any]:
    """uint8 ``[32, 3, 448, 448]``, as the worker makes them."""
    settings = MediaSettings()
    job = FramesJob(
        settings=TileSettings(SIDE, 1, 1, True),
        choice=FrameChoice(FRAMES),
        max_pixels=settings.max_image_pixels,
        max_frames=settings.max_source_frames,
        reader=reader,
        seconds=600,
    )
    message, buffers = answer(job, bytearray(encoded))
    assert isinstance(message, Frames)
    return np.stack([np.frombuffer(one, np.uint8) for one in buffers]).reshape(-1, 3, SIDE, SIDE)


def compare(theirs: np.ndarray[Any, Any], tiles: np.ndarray[Any, Any]) -> int:
    """The greatest difference of two results, in levels of 255."""
    levels = (theirs.transpose(0, 2, 3, 1) * STD + MEAN).transpose(0, 3, 1, 2) * 255
    return int(np.abs(np.round(levels) - tiles).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turns")
    parser.add_argument("--out", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()
    assert videos.load_decord()
    results: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "av": av.__version__,
        "decord": decord.__version__,
        "frames": FRAMES,
        "clips": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            for seconds in (10, 60):
                path = Path(folder) / f"{name}-{seconds}.mp4"
                encoded = clip(size, seconds, path)
                ways: dict[str, Callable[[], Any]] = {
                    "reference": lambda path=path: reference(path),
                    "pyav": lambda encoded=encoded: ours(encoded, "pyav"),
                    "decord": lambda encoded=encoded: ours(encoded, "decord"),
                }
                least = dict.fromkeys(ways, float("inf"))
                made: dict[str, np.ndarray[Any, Any]] = {}
                for _ in range(arguments.runs):
                    for way, function in ways.items():
                        began = time.process_time()
                        made[way] = function()
                        least[way] = min(least[way], time.process_time() - began)
                row: dict[str, Any] = {"encoded_bytes": len(encoded)}
                for way, used in least.items():
                    row[way] = {
                        "processor_seconds": round(used, 3),
                        "video_seconds_per_second_per_core": round(seconds / used, 2),
                    }
                    print(
                        f"{name:>6} {seconds:3d} s  {way:<10} {used:7.3f} s of processor time"
                        f"  {seconds / used:7.2f} s of video a second"
                    )
                row["most_levels_from_reference"] = {
                    way: compare(made["reference"], made[way]) for way in ("pyav", "decord")
                }
                print(f"{'':>17} differs by {row['most_levels_from_reference']} of 255")
                results["clips"][f"{name} {seconds} s"] = row
    text = json.dumps(results, indent=2)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
