"""The vocabulary of the media room: what the server asks for, what comes back, and the messages
between the pool and a decode worker. Every module here uses it; it opens nothing itself.

A worker never sends text. It names a ``Reason``, and the sentence a client reads is written in
``REASONS``: whatever a hostile file makes a library say stays inside the sandbox.
"""

import dataclasses
import enum

import msgspec

from wire.geometry import VisionGeometry


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """One picture of a request, before anything was fetched.

    ``url`` is a data:, http: or https: URL; ``param`` is the field an error names, for example
    "messages[0].content[1].image_url"; ``max_tiles`` can only lower the server's maximum. Only
    parts with the same ``salt`` have digests in common. The
    URL may hold a whole picture: it stays out of the repr, and so out of every log.
    """

    url: str = dataclasses.field(repr=False)
    param: str
    max_tiles: int | None = None
    salt: bytes = b""


@dataclasses.dataclass(frozen=True)
class TiledMedia:
    """One picture as the vision encoder takes it.

    ``tiles`` are contiguous bytes, uint8 ``[count, 3, side, side]``: ``rows * columns`` tiles
    row by row, then the thumbnail if there is one. ``width`` and ``height`` are the picture's
    own pixels, after orientation. ``digest`` identifies encoded bytes, tile settings and salt.
    """

    digest: bytes
    tiles: bytes = dataclasses.field(repr=False)
    count: int
    columns: int
    rows: int
    width: int
    height: int


class Reason(enum.Enum):
    """Why a worker refused a picture."""

    UNSUPPORTED = "unsupported"
    BROKEN = "broken"
    EMPTY = "empty"
    TOO_LARGE = "too_large"


# Reason -> (code of the error, what the client reads)
REASONS = {
    Reason.UNSUPPORTED: (
        "unsupported_media",
        "The picture is in no format this server reads (PNG, JPEG, WebP, GIF, BMP, TIFF).",
    ),
    Reason.BROKEN: ("invalid_media", "The picture is damaged or truncated."),
    Reason.EMPTY: ("invalid_media", "The picture has no pixels."),
    Reason.TOO_LARGE: ("media_too_large", "The picture has more pixels than this server decodes."),
}


class TileSettings(msgspec.Struct, frozen=True, array_like=True):
    """Everything besides the encoded bytes that decides the tiles of a picture.

    ``side`` is a tile's edge in pixels; the grid has between ``min_tiles`` and ``max_tiles``
    tiles, the thumbnail not counted.
    """

    side: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool

    @classmethod
    def of(cls, geometry: VisionGeometry, max_tiles: int | None = None) -> "TileSettings":
        """The model's settings, with a part's own maximum where it is lower."""
        most = geometry.max_tiles if max_tiles is None else min(max_tiles, geometry.max_tiles)
        most = max(most, 1)
        return cls(
            side=geometry.tile_size,
            min_tiles=min(geometry.min_tiles, most),
            max_tiles=most,
            use_thumbnail=geometry.use_thumbnail,
        )

    @property
    def digest_bytes(self) -> bytes:
        """Canonical bytes for the media digest."""
        return msgspec.msgpack.encode(self)

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest result: every tile and the thumbnail."""
        return (self.max_tiles + 1) * 3 * self.side * self.side


class Confine(msgspec.Struct, frozen=True, tag="confine"):
    """First message to a worker: the limits of its sandbox.

    ``memory`` is in bytes, over what the worker has mapped already; ``cpu`` in seconds per job.
    """

    memory: int
    cpu: int


class TileJob(msgspec.Struct, frozen=True, tag="tile"):
    """Decode and tile the one buffer that travels beside this message."""

    settings: TileSettings
    max_pixels: int


ToWorker = Confine | TileJob


class Confined(msgspec.Struct, frozen=True, tag="confined"):
    """The worker is ready. ``missing`` names the layers this system does not have."""

    missing: list[str]


class Tiled(msgspec.Struct, frozen=True, tag="tiled"):
    """The tiles travel as the one buffer beside this message; fields as in TiledMedia."""

    count: int
    columns: int
    rows: int
    width: int
    height: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The picture cannot be decoded; the worker lives on."""

    reason: Reason


FromWorker = Confined | Tiled | Refused
