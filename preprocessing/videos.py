"""A hostile video in, upright RGB pictures of the chosen frames out. In the decode worker only.

What a person sees in a player is what the model gets; the rules:

- Frames are counted, ordered by the time at which they are shown, and chosen before one is
  decoded. Seconds count from the first.
- Size: pixels of a frame are bounded before any exists, and again when the size changes.
- Damage: a frame that the decoder had to guess at is refused, and so is a file that is shorter
  than its index says. One without an index is shown as far as it goes.
- A frame without a picture of its own (dropped by the encoder) shows the one before; at the
  beginning of a recording that was cut there, the first that can be decoded.
- Rotation and mirroring are applied, to the nearest quarter turn; pixels that are not square are
  stretched; transparency is laid on white. The "reference" treatment takes pixels as square and
  ignores transparency, as decord does.
- Colours: FFmpeg's conversion to RGB, matrix and range as the file says, BT.601 where it says
  nothing. High dynamic range is not mapped. Interlaced frames are shown as they are.
"""

import bisect
import collections
import contextlib
import dataclasses
import importlib
import io
import itertools
import math
import os
import struct
from collections.abc import Generator, Iterator
from typing import Any, cast

import av
from av.sidedata.sidedata import Type as SideDataType
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from PIL import Image

from preprocessing.containers import Timeline, Video, open_video, read_timeline, refusing
from preprocessing.frames import choose_frames
from preprocessing.images import Unreadable
from preprocessing.media import FramesJob, LookJob, Reason, Treatment, VideoFacts

_SHOWN_NAMES = {"mov": "mp4", "mpegts": "mpeg-ts"}

_MOST_STRETCH = 16  # how many times wider than high a pixel may be, or higher than wide

# Where a display matrix leads the x axis and the y axis: sideways or not, against them or not.
_TURNS = {
    (False, False, False): None,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, False, True): Image.Transpose.ROTATE_270,
    (True, True, False): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = {turn for (is_sideways, _, _), turn in _TURNS.items() if is_sideways}
# Clockwise; Pillow counts the other way.
_DEGREES: dict[Image.Transpose | None, int] = {
    Image.Transpose.ROTATE_270: 90,
    Image.Transpose.ROTATE_180: 180,
    Image.Transpose.ROTATE_90: 270,
}

# Where decord gives the frames that it is asked for; of H.265 and MPEG-4, for one, it gives others.
_FOR_DECORD = {(file, codec) for file in ("mp4", "matroska") for codec in ("h264", "vp8", "vp9")}
_loaded: dict[str, Any] = {}  # "decord": the library, once it is loaded


def look_video(encoded: bytes | bytearray, job: LookJob) -> VideoFacts:
    """What the container says; of the frames one is decoded, for what it alone knows.

    Raises Unreadable, and nothing else.
    """
    file = io.BytesIO(encoded)
    with refusing():
        with open_video(file, job.max_pixels) as video:
            timeline = read_timeline(video, job.max_frames)
        return _look(file, timeline, job.treatment, job.max_pixels)


def read_frames(
    encoded: bytes | bytearray, job: FramesJob
) -> tuple[VideoFacts, list[int], list[float], Iterator[Image.Image]]:
    """The chosen frames: what the container says, their numbers, their seconds, and upright RGB
    pictures, decoded one after another as they are asked for.

    Raises Unreadable, and nothing else; so do the pictures.
    """
    file = io.BytesIO(encoded)
    with refusing():
        with open_video(file, job.max_pixels) as video:
            timeline = read_timeline(video, job.max_frames)
        chosen = choose_frames(timeline.seconds, job.choice, timeline.fps)
        if not chosen:
            raise Unreadable(Reason.OUT_OF_RANGE)
        facts = _look(file, timeline, job.settings.treatment, job.max_pixels)
    seconds = [timeline.seconds[number] for number in chosen]
    return facts, chosen, seconds, _pictures(file, timeline, facts, chosen, job)


def load_decord() -> bool:
    """Make decord ready for jobs that name it; false where this system has none."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads would stay outside the sandbox
    try:
        decord = importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError):
        return False
    decord.logging.set_level(decord.logging.QUIET)
    _loaded["decord"] = decord
    return True


def do_without_threads() -> None:
    """Have PyAV read all videos, from now on."""
    _loaded.clear()


def _look(
    file: io.BytesIO, timeline: Timeline, treatment: Treatment, max_pixels: int
) -> VideoFacts:
    with open_video(file, max_pixels) as video:
        frame = next(_decode(video, timeline, [0], treatment))
        turn = _turn(frame)
        width, height = _square(frame, video, treatment)
        if turn in _SIDEWAYS:
            width, height = height, width
        return VideoFacts(
            container=_SHOWN_NAMES.get(video.format, video.format),
            codec=video.stream.codec_context.codec.canonical_name,
            width=width,
            height=height,
            rotation=_DEGREES.get(turn, 0),
            frames=len(timeline.packets),
            duration=timeline.duration,
            fps=timeline.fps,
        )


def _pictures(
    file: io.BytesIO, timeline: Timeline, facts: VideoFacts, chosen: list[int], job: FramesJob
) -> Iterator[Image.Image]:
    left = list(chosen)
    is_for_decord = "decord" in _loaded and (facts.container, facts.codec) in _FOR_DECORD
    if job.reader == "decord" and is_for_decord:
        with contextlib.suppress(Exception):  # PyAV has the last word on what decord cannot read
            for picture in _read_with_decord(file, timeline, facts, chosen):
                del left[0]
                yield picture
    if left:
        try:
            yield from _read(file, timeline, left, job)
        except Unreadable:
            # What a container calls a key frame may be none: decode everything.
            yield from _read(file, dataclasses.replace(timeline, keys=timeline.keys[:1]), left, job)


def _read(
    file: io.BytesIO, timeline: Timeline, left: list[int], job: FramesJob
) -> Iterator[Image.Image]:
    """Read the frames that are ``left``, of which those that were given are taken."""
    treatment = job.settings.treatment
    with refusing(), open_video(file, job.max_pixels) as video:
        for frame in _decode(video, timeline, list(left), treatment):
            picture = _upright(frame, video, treatment)
            del left[0]
            yield picture


def _upright(frame: VideoFrame, video: Video, treatment: Treatment) -> Image.Image:
    picture = _to_rgb(frame, treatment)
    size = _square(frame, video, treatment)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    turn = _turn(frame)
    return picture if turn is None else picture.transpose(turn)


def _read_with_decord(
    file: io.BytesIO, timeline: Timeline, facts: VideoFacts, chosen: list[int]
) -> Iterator[Image.Image]:
    decord = _loaded["decord"]
    file.seek(0)
    reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
    if len(reader) != len(timeline.packets):
        raise ValueError("decord counts other frames")
    for number in chosen:
        picture = Image.fromarray(reader[number].asnumpy())
        size = facts.width, facts.height
        yield picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


@dataclasses.dataclass
class _Run:
    """Packets ``first`` to ``last`` are decoded for the frames ``chosen``."""

    first: int
    last: float
    chosen: list[int]


def _runs(timeline: Timeline, chosen: list[int]) -> list[_Run]:
    """What has to be decoded for the chosen frames: from the last key frame before each."""
    if not timeline.is_ordered:
        return [_Run(0, math.inf, chosen)]
    runs: list[_Run] = []
    for frame in chosen:
        packet, time = timeline.packets[frame], timeline.times[frame]
        at = bisect.bisect_right(timeline.keys, packet, key=lambda key: key[0]) - 1
        # A frame that stands behind a key frame but is shown before it needs the one before.
        while at > 0 and timeline.keys[at][1] > time:
            at -= 1
        first = timeline.keys[at][0] if at >= 0 else 0
        if runs and first <= runs[-1].last + 1:
            runs[-1].last = max(runs[-1].last, packet)
            runs[-1].chosen.append(frame)
        else:
            runs.append(_Run(first, packet, [frame]))
    return runs


def _decode(
    video: Video, timeline: Timeline, chosen: list[int], treatment: Treatment
) -> Iterator[VideoFrame]:
    """The chosen frames, in order; nothing is decoded that none of them needs."""
    decoder = _decoder(video, treatment)
    packets = video.packets()
    for run in _runs(timeline, chosen):
        waiting = collections.deque(run.chosen)
        latest: VideoFrame | None = None
        with contextlib.closing(_decode_run(decoder, packets, run, timeline)) as decoded:
            for number, frame in decoded:
                while waiting and waiting[0] < number:
                    # It has no picture of its own. The key frame may be none, unless it is the
                    # first: then what is shown before needs frames that the file does not have.
                    if latest is None and run.first > timeline.first_key:
                        raise Unreadable(Reason.BROKEN)
                    waiting.popleft()
                    yield latest or frame
                if waiting and waiting[0] == number:
                    waiting.popleft()
                    yield frame
                if not waiting:
                    break
                latest = frame
        for _ in waiting:
            if latest is None:
                raise Unreadable(Reason.BROKEN)
            yield latest


def _decode_run(
    decoder: VideoCodecContext,
    packets: Iterator[tuple[int, "av.Packet[av.VideoStream]"]],
    run: _Run,
    timeline: Timeline,
) -> Generator[tuple[int, VideoFrame], None, None]:
    """Every frame that a run gives, with its number, as the decoder gives them."""
    counter = itertools.count()
    wanted = {timeline.packets[frame] for frame in run.chosen}
    begin: int | None = None

    def numbered(decoded: list[VideoFrame]) -> Iterator[tuple[int, VideoFrame]]:
        for frame in decoded:
            packet = cast(tuple[int] | None, frame.opaque)
            if not timeline.is_ordered:
                yield next(counter), frame
            elif packet is not None and packet[0] in timeline.frames:
                yield timeline.frames[packet[0]], frame

    try:
        for at, packet in packets:
            if at < run.first:
                continue
            if decoder.name == "h264" and timeline.is_ordered:
                # Nothing depends on a frame that none refers to.
                decoder.skip_frame = "DEFAULT" if at in wanted else "NONREF"
            time = packet.pts or 0
            begin = time if begin is None else begin
            packet.opaque = (at,)  # an object of its own: PyAV knows it by its address
            try:
                if packet.size:  # an empty packet says that the frame before stays
                    yield from numbered(decoder.decode(packet))
            except av.FFmpegError:
                # What is shown before the key frame may need frames that were not decoded.
                if time >= begin or not timeline.is_ordered:
                    raise
            if at >= run.last:
                break
        yield from numbered(decoder.decode(None))
    finally:
        decoder.flush_buffers()


def _decoder(video: Video, treatment: Treatment) -> VideoCodecContext:
    """The stream's own decoder; for VP8 and VP9 with transparency, one that decodes that too."""
    decoder = video.stream.codec_context
    if treatment == "normalized" and video.stream.metadata.get("alpha_mode") == "1":
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name, "")
        if name in av.codecs_available:
            decoder = cast(VideoCodecContext, VideoCodecContext.create(name, "r"))
    decoder.thread_count = 1
    decoder.copy_opaque = True  # a frame tells which packet it was
    decoder.options = {"max_pixels": str(video.most_pixels)}
    if decoder.name == "h264":
        # Hold frames back as long as the standard allows, instead of guessing their order.
        decoder.options["strict"] = "1"
    return decoder


def _square(frame: VideoFrame, video: Video, treatment: Treatment) -> tuple[int, int]:
    """Width and height of a frame, before it is turned, as square pixels."""
    width, height = frame.width, frame.height
    ratio = video.stream.sample_aspect_ratio
    if treatment == "normalized" and ratio and 1 / _MOST_STRETCH <= ratio <= _MOST_STRETCH:
        width = max(1, round(width * ratio))
    if width * height > video.most_pixels:
        raise Unreadable(Reason.TOO_LARGE)
    return width, height


def _turn(frame: VideoFrame) -> Image.Transpose | None:
    """What has to be done to a frame to set it upright: the nearest of eight ways."""
    try:
        matrix = cast(Any, frame.side_data)[SideDataType.DISPLAYMATRIX]
    except (KeyError, ValueError):  # ValueError: a kind of data that the library does not know
        return None
    # Rows (a, b, u), (c, d, v), (x, y, w): a point (p, q) goes to (a p + c q + x, b p + d q + y).
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _TURNS[False, a < 0, d < 0]
    return _TURNS[True, b < 0, c < 0]


def _to_rgb(frame: VideoFrame, treatment: Treatment) -> Image.Image:
    if frame.is_corrupt:
        raise Unreadable(Reason.BROKEN)
    pixels = frame.format
    is_clear = pixels.has_palette or any(part.is_alpha for part in pixels.components)
    if not is_clear or treatment == "reference":
        return _picture(frame, "RGB", "rgb24")
    clear = _picture(frame, "RGBA", "rgba")
    page = Image.new("RGB", clear.size, "white")
    page.paste(clear, mask=clear.getchannel("A"))
    return page


def _picture(frame: VideoFrame, mode: str, pixels: str) -> Image.Image:
    plane = frame.reformat(format=pixels, interpolation="BICUBIC", threads=1).planes[0]
    size = plane.width, plane.height
    return Image.frombytes(mode, size, memoryview(plane), "raw", mode, plane.line_size)
