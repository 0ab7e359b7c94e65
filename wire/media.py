"""Settings of media, a part of wire.settings."""

import dataclasses
import os

from wire.knob import knob


@dataclasses.dataclass(frozen=True)
class MediaSettings:
    """Fetching and decoding of pictures and videos."""

    media_workers: int = knob(
        0, "Decode processes; 0: one for every two cores, from 2 to 4.", low=0, high=64
    )
    media_timeout: float = knob(20.0, "Seconds to decode and tile one picture.", low=0.1)
    fetch_timeout: float = knob(10.0, "Seconds to download one picture, all redirects.", low=0.1)
    video_fetch_timeout: float = knob(
        30.0, "Seconds to download one video, all redirects.", low=0.1
    )
    max_media_bytes: int = knob(32 << 20, "Largest encoded picture in bytes.", low=1)
    max_video_bytes: int = knob(256 << 20, "Largest encoded video in bytes.", low=1)
    max_request_media_bytes: int = knob(
        512 << 20, "Encoded bytes that the pictures and videos of one request may have.", low=1
    )
    video_timeout: float = knob(60.0, "Seconds to decode and tile one video.", low=0.1)
    num_video_frames: int = knob(
        32, "Frames shown of a video that asks for no number; as in the reference.", low=1
    )
    max_video_frames: int = knob(128, "Most frames that a request may ask of one video.", low=1)
    max_source_frames: int = knob(
        200_000, "Most frames a video may have; counted before any is decoded.", low=1
    )
    video_reader: str = knob(
        "auto",
        "What decodes videos: PyAV ('auto', 'pyav'), or decord where it gives the same frames.",
        choices=("auto", "decord", "pyav"),
    )
    preprocess: str = knob(
        "normalized",
        "How pictures are shown that ask for nothing: as a person sees them (turned upright, "
        "transparency on white), or as the model's own code does.",
        choices=("normalized", "reference"),
    )
    image_decoding: str = knob(
        "exact",
        "How large JPEGs are decoded: 'exact' gives the reference's tiles to the bit; 'fast' "
        "decodes at half their size or less while that leaves twice the pixels of the grid, which "
        "changes photographs by about one level of 255 and hard edges by more.",
        choices=("exact", "fast"),
    )
    max_image_pixels: int = knob(
        178_956_970, "Most pixels of one picture (default: Pillow's bomb limit).", low=1
    )
    media_memory: int = knob(
        1 << 30,
        "Bytes of the pictures, encoded and as tiles, that are fetched and decoded at once; "
        "further ones wait. Half is for those from URLs, which are told to come again when it is "
        "full, half for those in requests.",
        low=1,
    )
    tile_cache_bytes: int = knob(
        256 << 20, "Memory for the tiles of pictures that may be sent again; 0: none.", low=0
    )
    max_images: int = knob(64, "Most pictures in one request.", low=0)
    max_videos: int = knob(4, "Most videos in one request.", low=0)
    require_sandbox: bool = knob(
        False,
        "Do not start where the kernel lacks a layer of the decode workers' sandbox; otherwise "
        "the start only says which.",
    )
    allow_private_media: bool = knob(
        False,
        "Let URLs of pictures and videos point at private, loopback and link-local addresses.",
    )
    allowed_media_domains: tuple[str, ...] = knob(
        (), "If set, URLs of pictures and videos may only name these hosts; comma-separated."
    )
    allowed_media_ports: tuple[str, ...] = knob(
        ("80", "443"),
        "Ports that URLs of pictures and videos may name; comma-separated; empty for any.",
    )
    allowed_local_media_path: str = knob(
        "", "Folder whose files may be named by file: URLs; default: no file may."
    )
    media_proxy: str = knob(
        "",
        "HTTP proxy for URLs of pictures and videos, 'http://[user:password@]host:port'. It "
        "resolves the names and has to guard its own network. Proxies of the environment are "
        "never used.",
        secret=True,
    )

    @property
    def decode_workers(self) -> int:
        """How many there are."""
        return self.media_workers or min(max(_cores() // 2, 2), 4)


def _cores() -> int:
    """The cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(allowed(0)) if allowed else os.cpu_count() or 1
