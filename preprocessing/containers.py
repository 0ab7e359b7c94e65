"""The outside of a hostile video: which container it is, its stream, and when its frames are shown.
Runs in the decode worker only; nothing is decoded here.

A container is known by its first bytes, never by a name or a MIME type, and only the demuxer of
that container sees the file. It reads the given bytes and can open nothing else: playlists are no
containers, and references to other files lead nowhere.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
from collections.abc import Generator, Iterator
from typing import Any, cast

import av

# PyAV imports these when a file has such a stream; in the sandbox no module can be read any more.
import av.audio.codeccontext
import av.audio.stream
import av.subtitles.codeccontext
import av.subtitles.stream
from av.container.input import InputContainer
from av.stream import Discard, Disposition

from preprocessing.headers import boxes
from preprocessing.images import Unreadable
from preprocessing.media import Reason

# Where, which first bytes, FFmpeg's name of the demuxer.
_MOV_BOXES = (
    b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"moof", b"sidx",
)  # fmt: skip
_MAGIC = (
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"OggS", "ogg"),
    (0, b"GIF8", "gif"),
    (0, b"\x89PNG\r\n\x1a\n", "apng"),
    (0, b"FLV\1", "flv"),
    (0, b"\0\0\1\xba", "mpeg"),
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "asf"),
    (8, b"AVI ", "avi"),
    *((4, box, "mov") for box in _MOV_BOXES),
)

# FFmpeg's names; what cameras, phones, browsers and editors write.
DECODERS = (
    "h264", "hevc", "vvc", "libdav1d", "vp8", "libvpx", "vp9", "libvpx-vp9", "mpeg4", "mpeg2video",
    "mpeg1video", "mjpeg", "theora", "prores", "dnxhd", "dvvideo", "h263", "flv", "vp6", "vp6f",
    "msmpeg4", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1", "gif", "apng", "png", "qtrle", "ffv1",
    "huffyuv", "ffvhuff", "rawvideo",
)  # fmt: skip

# What the highest level (6.2) of H.264, H.265 and AV1 allows a picture to have.
MOST_PIXELS = 35_651_584


@dataclasses.dataclass(frozen=True)
class Video:
    """An open container and the stream that is shown: the default one, else the first that is
    not the picture of a cover."""

    container: InputContainer
    stream: av.VideoStream
    format: str
    most_pixels: int

    def packets(self) -> Iterator[tuple[int, "av.Packet[av.VideoStream]"]]:
        """The packets of the stream, numbered; without the empty one that PyAV adds."""
        # PyAV's generator frees what it has allocated when it is closed, not when it is forgotten.
        demuxed = cast(Generator["av.Packet[av.VideoStream]"], self.container.demux(self.stream))
        with contextlib.closing(demuxed):
            for number, packet in enumerate(demuxed):
                if packet.size or packet.dts is not None or packet.pts is not None:
                    yield number, packet


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The frames that a video shows, in order. Packets are numbered as they stand in the file.

    ``packets``, ``times`` (in the stream's unit) and ``seconds`` (from the first) belong to the
    frames; ``keys`` are the numbers and times of the packets at which decoding can begin. Where
    the container does not say in which order frames are shown, ``is_ordered`` is false, and the
    order is the decoder's. ``fps`` is 0 for a single frame without duration.
    """

    packets: list[int]
    times: list[int]
    seconds: list[float]
    keys: list[tuple[int, int]]
    is_ordered: bool
    fps: float
    duration: float

    @property
    def first_key(self) -> int:
        """The packet before which nothing can be decoded."""
        return self.keys[0][0] if self.keys else 0

    @functools.cached_property
    def frames(self) -> dict[int, int]:
        """The frame of each packet."""
        return {packet: frame for frame, packet in enumerate(self.packets)}


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn whatever a damaged file makes the library raise into Unreadable."""
    try:
        yield
    except Unreadable:
        raise
    except MemoryError:
        raise Unreadable(Reason.TOO_LARGE) from None
    except Exception:
        # PyAV raises subclasses of OSError and ValueError, and what its own code runs into.
        raise Unreadable(Reason.BROKEN) from None


@contextlib.contextmanager
def open_video(file: io.BytesIO, max_pixels: int) -> Iterator[Video]:
    """Open a container at its beginning and check the size it declares."""
    name = _container_of(file)
    if name == "mov":
        _check_tables(file.getvalue())
    most = min(max_pixels, MOST_PIXELS)
    options = {
        "protocol_whitelist": "none",
        "codec_whitelist": ",".join(DECODERS),
        "max_pixels": str(MOST_PIXELS),
    }
    file.seek(0)
    with av.open(
        file, "r", name, options, metadata_errors="replace", io_open=_open_nothing
    ) as container:
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise Unreadable(Reason.NO_VIDEO)
        default = [stream for stream in streams if stream.disposition & Disposition.default]
        shown = (default or streams)[0]
        for stream in container.streams:
            if stream is not shown:
                stream.discard = Discard.all
        decoder = shown.codec_context
        if decoder is None or decoder.name not in DECODERS:
            raise Unreadable(Reason.UNSUPPORTED)
        if decoder.width * decoder.height > most:
            raise Unreadable(Reason.TOO_LARGE)
        yield Video(container, shown, name, most)


def _container_of(file: io.BytesIO) -> str:
    with file.getbuffer() as encoded:
        for at, magic, name in _MAGIC:
            if encoded[at : at + len(magic)] == magic:
                return name
        # A transport stream: packets of 188 bytes, or of 192 with a time before each.
        for first, step in ((0, 188), (4, 192)):
            if bytes(encoded[first : first + 2 * step + 1 : step]) == b"GGG":
                return "mpegts"
    raise Unreadable(Reason.UNSUPPORTED)


def _check_tables(encoded: bytes) -> None:
    """Refuse a MOV or MP4 file that claims more samples than it has bits.

    The tables stsz and trun can claim any number without listing one, and FFmpeg takes 36 bytes
    for each. They may stand anywhere but among the samples; in what is compressed they cannot be
    seen.
    """
    for kind, start, end in boxes(encoded):
        if kind == b"mdat":
            continue
        if encoded.find(b"cmvd", start, end) >= 0:
            raise Unreadable(Reason.UNSUPPORTED)
        for table, before in ((b"stsz", 8), (b"trun", 4)):
            at = encoded.find(table, max(start - 16, 4), end)
            while at >= 0:
                size = int.from_bytes(encoded[at - 4 : at], "big")
                count = at + 4 + 8 * (size == 1) + before
                claimed = int.from_bytes(encoded[count : count + 4], "big")
                # Before a text that only looks like a table stands no size.
                if size <= len(encoded) and claimed > 8 * len(encoded):
                    raise Unreadable(Reason.BROKEN)
                at = encoded.find(table, at + 4, end)


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> None:
    """What FFmpeg calls to open a file that a container refers to."""
    raise Unreadable(Reason.BROKEN)


def read_timeline(video: Video, max_frames: int) -> Timeline:
    """Read all packets. What an edit list or the codec hides is no frame, nor is what stands
    before the first key frame."""
    stream, codec = video.stream, video.stream.codec_context
    shown: list[tuple[int | None, int | None, int]] = []
    keys: list[tuple[int, int]] = []
    count = duration = 0
    for number, packet in video.packets():
        # In a transport stream it says no more than that something was lost before.
        if packet.is_corrupt and video.format != "mpegts":
            raise Unreadable(Reason.BROKEN)
        if packet.is_keyframe:
            keys.append((number, packet.pts or 0))
        if not packet.is_discard and not _is_hidden(codec.name, packet):
            shown.append((packet.pts, packet.dts, number))
            duration = max(packet.duration or 0, 0)
        if len(shown) > max_frames:
            raise Unreadable(Reason.TOO_MANY_FRAMES)
        count = number + 1
    if video.format == "mov" and count < len(stream.index_entries):
        raise Unreadable(Reason.BROKEN)  # the index promises more
    if keys:
        del shown[: bisect.bisect_left(shown, keys[0][0], key=lambda one: one[2])]
    if not shown:
        raise Unreadable(Reason.NO_FRAMES)
    # AVI has no times of showing, and FFmpeg's guesses are wrong where B-frames are nested.
    is_guessed = video.format == "avi" and codec.has_b_frames
    is_ordered = not is_guessed and all(pts is not None for pts, _, _ in shown)
    unit = float(stream.time_base or 0) or 1 / 25
    if is_ordered:
        shown.sort()
    times: list[Any] = [pts if is_ordered else dts for pts, dts, _ in shown]
    if None in times:
        step = 1 / (unit * float(stream.average_rate or 25))
        times = [round(at * step) for at in range(len(times))]
    times.sort()
    seconds = [(time - times[0]) * unit for time in times]
    gap = seconds[-1] / (len(times) - 1) if len(times) > 1 else duration * unit
    return Timeline(
        packets=[number for _, _, number in shown],
        times=times,
        seconds=seconds,
        keys=keys,
        is_ordered=is_ordered,
        fps=1 / gap if gap > 0 else 0.0,
        duration=seconds[-1] + gap,
    )


def _is_hidden(codec: str, packet: "av.Packet[av.VideoStream]") -> bool:
    """Whether a VP8 packet holds a picture that is only referred to (bit 4 of its header)."""
    return codec == "vp8" and packet.size > 0 and not memoryview(packet)[0] & 0x10
