"""The front end's part of ``internvl doctor``: what pictures and videos are decoded with."""

import asyncio
import importlib.util

from preprocessing import MediaPipeline
from server.version import installed_version
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

# Module -> what it is for, where it is an extra.
EXTRAS = {
    "decord": "videos with --video-reader decord",
    "pillow_jxl": "JPEG XL",
    "_pi_heif": "HEIC",
}


def examine() -> int:
    """Print it; 1 if pictures cannot be decoded."""
    pillow, pyav = installed_version("pillow"), installed_version("av")
    print(f"ok    pictures by Pillow {pillow}, videos by PyAV {pyav}")
    for module, use in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"ok    without {use}: {module} is not installed")
    try:
        missing = asyncio.run(_sandbox())
    except Exception as error:  # whatever keeps a process from being started and shut in
        print(f"bad   pictures cannot be decoded: {error}")
        return 1
    if missing:
        print(
            f"poor  pictures are decoded without these layers of the sandbox: {', '.join(missing)}"
        )
    else:
        print("ok    pictures are decoded in a sandbox with all its layers")
    return 0


async def _sandbox() -> list[str]:
    """The layers that a decode worker of this machine lacks."""
    media = MediaPipeline(MediaSettings(media_workers=1))
    await media.start(VisionGeometry(tile_size=448, tokens_per_tile=256))
    try:
        return list(media.missing)
    finally:
        await media.close()
