"""The vocabulary of the media room: what the server asks for, what comes back, and the messages
between the pool and a decode worker. Every module here uses it; it opens nothing itself.

A worker never sends text of its own making that a client reads. It names a ``Reason``, and the
sentence is written in ``REASONS``: whatever a hostile file makes a library say stays inside the
sandbox.
"""

import dataclasses
import enum
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from preprocessing.allowance import Allowance
from wire.errors import Code, MediaRefused, Unavailable
from wire.geometry import VisionGeometry

Kind = Literal["image", "video"]
# "normalized" shows the model what a person sees; "reference" what the model's own code shows it.
Treatment = Literal["normalized", "reference"]

NOUNS: dict[Kind, str] = {"image": "The picture", "video": "The video"}


class FrameChoice(msgspec.Struct, frozen=True, array_like=True):
    """Which frames of a video are shown: the middles of equal segments.

    ``most`` of them, or fewer if ``fps`` frames per second are fewer or the video has fewer;
    ``start`` and ``end`` in seconds bound where they come from, None is the video's own.
    """

    most: int
    fps: float | None = None
    start: float | None = None
    end: float | None = None


@dataclasses.dataclass(frozen=True)
class File:
    """Encoded bytes that are here already, and their ``content_digest``, so that nobody hashes
    them again."""

    data: bytes = dataclasses.field(repr=False, compare=False)
    digest: bytes


Source = str | File


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """One picture or video of a request, before anything was fetched.

    ``url`` is a data:, http(s): or file: URL or a file that is here, or those of a video's frames;
    ``param`` is the field an error names, for example "messages[0].content[1].image_url".
    ``min_tiles`` and ``max_tiles`` bound the tiles of the picture, or of each frame; None is the
    model's own (for a frame one tile, as in the reference). ``choice`` is there for a video. A part
    that may be made to ``fit`` gets fewer frames or tiles where it otherwise would not. Parts of
    one request share an ``allowance``. Only parts with the same ``salt`` have digests in common.
    With a ``geometry`` it is cut for another model than the one that is served.
    The URL may hold a whole picture: it stays out of the repr, and so out of every log.
    """

    url: Source | tuple[Source, ...] = dataclasses.field(repr=False)
    param: str
    max_tiles: int | None = None
    salt: bytes = b""
    min_tiles: int | None = None
    kind: Kind = "image"
    treatment: Treatment = "normalized"
    choice: FrameChoice | None = None
    fit: bool = False
    allowance: Allowance | None = dataclasses.field(default=None, repr=False, compare=False)
    geometry: VisionGeometry | None = None

    @property
    def urls(self) -> tuple[Source, ...]:
        """Of all its files."""
        return self.url if isinstance(self.url, tuple) else (self.url,)

    @property
    def is_remote(self) -> bool:
        """Whether something of it must be downloaded."""
        urls = [url for url in self.urls if isinstance(url, str)]
        return any(url[:5].lower() not in ("data:", "file:") for url in urls)


class Spent(NamedTuple):
    """Seconds that a request has waited for a picture or video: from its URL to its bytes, for a
    worker, and there until it was decoded and until it was tiled; only the first where its tiles
    were in the cache."""

    fetch: float = 0.0
    queue: float = 0.0
    decode: float = 0.0
    tile: float = 0.0

    @property
    def prepare(self) -> float:
        """From the bytes to the tiles."""
        return self.queue + self.decode + self.tile

    def within(self, seconds: float) -> "Spent":
        """``seconds`` in all behind ``fetch``: what no worker has used was waiting. A worker cannot
        have used more."""
        decode = min(self.decode, seconds)
        tile = min(self.tile, seconds - decode)
        return Spent(self.fetch, seconds - decode - tile, decode, tile)


NOTHING = Spent()


@dataclasses.dataclass(frozen=True)
class TiledMedia:
    """One picture, or one frame of a video, as the vision encoder takes it.

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
    spent: Spent = dataclasses.field(default=NOTHING, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the tiles."""
        return len(self.tiles)


class Reason(enum.Enum):
    """Why a worker refused a picture or a video."""

    UNSUPPORTED = "unsupported"
    BROKEN = "broken"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    NO_HEIC = "no_heic"
    NO_JPEG_XL = "no_jpeg_xl"
    NO_VIDEO = "no_video"
    NO_FRAMES = "no_frames"
    TOO_MANY_FRAMES = "too_many_frames"
    OUT_OF_RANGE = "out_of_range"


_FORMATS: dict[Kind, str] = {
    "image": (
        "PNG, JPEG, HEIC, HEIF, WebP, GIF, BMP, DIB, TIFF, AVIF, JPEG 2000, ICO, CUR, ICNS, PPM, "
        "PSD, DDS, QOI, PCX, DCX, SGI, Sun, XBM, XPM, FITS, BLP, FLI, FTEX, GBR, McIDAS, MSP, "
        "PIXAR, XV thumbnail, PCD, IMT, SPIDER, TGA"
    ),
    "video": "MP4, MOV, MKV, WebM, AVI, MPEG, GIF",
}

# Reason -> (code of the error, what the client reads; {What} is a noun)
REASONS: dict[Reason, tuple[Code, str]] = {
    Reason.UNSUPPORTED: (
        "unsupported_media",
        "{What} is in no format this server reads ({formats}).",
    ),
    Reason.BROKEN: ("invalid_media", "{What} is damaged or truncated."),
    Reason.EMPTY: ("invalid_media", "{What} has no pixels."),
    Reason.TOO_LARGE: ("media_too_large", "{What} has more pixels than this server decodes."),
    Reason.NO_HEIC: (
        "unsupported_media",
        "{What} is HEIC, which this server cannot read on its system; it reads AVIF, JPEG, PNG "
        "and others.",
    ),
    Reason.NO_JPEG_XL: (
        "unsupported_media",
        "{What} is JPEG XL, which this server was installed without.",
    ),
    Reason.NO_VIDEO: ("invalid_media", "The file has no video stream."),
    Reason.NO_FRAMES: ("invalid_media", "The video has no frames."),
    Reason.TOO_MANY_FRAMES: (
        "media_too_large",
        "The video has more frames than this server reads.",
    ),
    Reason.OUT_OF_RANGE: (
        "invalid_value",
        "The video has no frames between 'start' and 'end'.",
    ),
}


def refusal(reason: Reason, kind: Kind, param: str) -> MediaRefused:
    """The error that tells a client of a worker's refusal."""
    code, sentence = REASONS[reason]
    message = sentence.format(What=NOUNS[kind], formats=_FORMATS[kind])
    return MediaRefused(message, param=param, code=code)


def is_of_no_format(refused: MediaRefused, kind: Kind) -> bool:
    """Whether a file was refused because nothing of this kind looks like it."""
    return refused.message == refusal(Reason.UNSUPPORTED, kind, "").message


def neither(param: str) -> MediaRefused:
    """The error for a file that is neither a picture nor a video."""
    return MediaRefused(
        "The file is neither a picture nor a video in a format this server reads "
        f"({_FORMATS['image']}; {_FORMATS['video']}).",
        param=param,
        code="unsupported_media",
    )


def too_many(param: str) -> Unavailable:
    """The error for a part that has waited too long for its turn."""
    return Unavailable("Too many pictures are waiting to be decoded.", param=param, retry_after=10)


class TileSettings(msgspec.Struct, frozen=True, array_like=True):
    """Everything besides the encoded bytes that decides the tiles of a picture.

    ``side`` is a tile's edge in pixels; the grid has between ``min_tiles`` and ``max_tiles``
    tiles, the thumbnail not counted. ``fast`` lets a large JPEG be decoded at half, a quarter or
    an eighth of its size.
    """

    side: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    treatment: Treatment = "normalized"
    fast: bool = False

    @classmethod
    def of(
        cls,
        geometry: VisionGeometry,
        max_tiles: int | None = None,
        min_tiles: int | None = None,
        treatment: Treatment = "normalized",
    ) -> "TileSettings":
        """The model's settings with a part's own bounds, within what the server allows."""
        most = geometry.max_tiles if max_tiles is None else min(max_tiles, geometry.tile_limit)
        most = max(most, 1)
        least = geometry.min_tiles if min_tiles is None else min_tiles
        return cls(
            side=geometry.tile_size,
            min_tiles=max(1, min(least, most)),
            max_tiles=most,
            use_thumbnail=geometry.use_thumbnail,
            treatment=treatment,
        )

    @classmethod
    def for_part(cls, geometry: VisionGeometry, part: MediaPart) -> "TileSettings":
        """What ``part`` asks for; a frame has one tile unless it asks for more."""
        most = 1 if part.kind == "video" and part.max_tiles is None else part.max_tiles
        return cls.of(geometry, most, part.min_tiles, part.treatment)

    @property
    def digest_bytes(self) -> bytes:
        """Canonical bytes for the media digest."""
        return msgspec.msgpack.encode(self)

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest result, the thumbnail included."""
        return self.max_tiles + (self.use_thumbnail and self.max_tiles > 1)

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest result."""
        return self.most_tiles * 3 * self.side * self.side


class Confine(msgspec.Struct, frozen=True, tag="confine"):
    """First message to a worker: the limits of its sandbox.

    ``memory`` is in bytes, over what the worker has mapped already. The ``video_reader`` that
    later jobs will name has to be loaded before.
    """

    memory: int
    video_reader: str = "auto"


class LookJob(msgspec.Struct, frozen=True, tag="look", kw_only=True):
    """Read the header of the one buffer that travels beside this message; no pixel is decoded
    but those of a video's first frame, which alone says how it is turned.

    ``seconds`` of processor time may be used, as in every job.
    """

    kind: Kind
    treatment: Treatment
    max_pixels: int
    max_frames: int
    seconds: int


class TileJob(msgspec.Struct, frozen=True, tag="tile", kw_only=True):
    """Decode and tile the one buffer that travels beside this message."""

    settings: TileSettings
    max_pixels: int
    seconds: int


class FramesJob(msgspec.Struct, frozen=True, tag="frames", kw_only=True):
    """Decode some frames of the video beside this message, and tile each.

    ``max_frames`` bounds the frames that its container may have, ``choice.most`` those shown.
    ``reader`` is "auto", "decord" or "pyav".
    """

    settings: TileSettings
    choice: FrameChoice
    max_pixels: int
    max_frames: int
    reader: str
    seconds: int


Job = LookJob | TileJob | FramesJob
ToWorker = Confine | Job


# What a worker may say at all: whatever is outside is no message of it. Names are read by clients.
_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{0,20}\Z")]
_Count = Annotated[int, Meta(ge=1, le=1 << 31)]
_Number = Annotated[int, Meta(ge=0, le=1 << 31)]
_Amount = Annotated[float, Meta(ge=0, le=1e30)]  # neither infinite nor no number


class Confined(msgspec.Struct, frozen=True, tag="confined"):
    """The worker is ready. ``missing`` names the layers this system does not have."""

    missing: list[str]


class PictureFacts(msgspec.Struct, frozen=True, tag="picture"):
    """What the header of a picture says: its size as it will be shown, its EXIF ``orientation``
    (1 to 8) and, of an animation, the number of ``frames``, of which the first is shown; 2 stands
    for several where the header does not tell (GIF, TIFF)."""

    format: _Name
    width: _Count
    height: _Count
    orientation: Annotated[int, Meta(ge=1, le=8)] = 1
    frames: _Count = 1


class VideoFacts(msgspec.Struct, frozen=True, tag="video"):
    """What a video's container says: its size as it will be shown, clockwise ``rotation`` in
    degrees, number of ``frames``, ``duration`` in seconds and average frames per second."""

    container: _Name
    codec: _Name
    width: _Count
    height: _Count
    rotation: Annotated[int, Meta(ge=0, le=270, multiple_of=90)]
    frames: _Count
    duration: _Amount
    fps: _Amount


Facts = PictureFacts | VideoFacts


class Tiled(msgspec.Struct, frozen=True, tag="tiled"):
    """The tiles travel as the one buffer beside this message; fields as in TiledMedia, and seconds
    of the worker."""

    count: _Count
    columns: _Count
    rows: _Count
    width: _Count
    height: _Count
    decode_seconds: _Amount = 0.0
    tile_seconds: _Amount = 0.0


class Frames(msgspec.Struct, frozen=True, tag="frames"):
    """Frames of a video, in order: their numbers, their ``seconds`` from the beginning, and a
    buffer of tiles for each beside this message."""

    facts: VideoFacts
    indices: list[_Number]
    seconds: list[_Amount]
    tiles: list[Tiled]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The file cannot be decoded; the worker lives on."""

    reason: Reason


Answer = PictureFacts | VideoFacts | Tiled | Frames | Refused
FromWorker = Confined | Answer


@dataclasses.dataclass(frozen=True)
class TiledVideo:
    """The frames of a video that are shown, their numbers, and their ``seconds`` from its
    beginning. One that was given as pictures has neither ``seconds`` nor ``facts``."""

    digest: bytes
    frames: tuple[TiledMedia, ...]
    indices: tuple[int, ...]
    seconds: tuple[float, ...] = ()
    facts: VideoFacts | None = None
    spent: Spent = dataclasses.field(default=NOTHING, compare=False)

    @property
    def size(self) -> int:
        """Bytes of all tiles."""
        return sum(frame.size for frame in self.frames)


Loaded = TiledMedia | TiledVideo


@dataclasses.dataclass(frozen=True)
class Opened:
    """The encoded bytes of a part, and what their headers say if that was asked for: one file and
    one ``Facts``, or those of each picture of a video that was given as pictures."""

    files: tuple[bytes, ...] = dataclasses.field(repr=False)
    facts: tuple[Facts, ...]
    fetch_seconds: float
