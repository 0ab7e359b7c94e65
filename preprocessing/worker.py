"""The decode worker: ``python -m preprocessing.worker FD``, one child of the pool each.

Hostile bytes are opened here and nowhere else. It reads one job at a time from the inherited
socket, answers with tiles or a typed refusal, and ends at the socket's end of file. It must
never import a network library, and nothing at all after it has entered its sandbox.
"""

import ctypes
import io
import os
import signal
import socket
import sys
import time

from PIL import Image

from preprocessing import images, sandbox, tiling, videos
from preprocessing.media import (
    Confine,
    Confined,
    FrameChoice,
    Frames,
    FramesJob,
    FromWorker,
    Job,
    Reason,
    Refused,
    Tiled,
    TileJob,
    TileSettings,
    ToWorker,
)
from wire.channel import Buffer, Channel, ChannelClosed

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def main(descriptor: int) -> None:
    """Serve jobs until the parent closes the channel."""
    # Meant for the server, which may want to finish what runs; it ends us when it is done.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel: Channel[ToWorker] = Channel(socket.socket(fileno=descriptor), ToWorker)
    try:
        first, _ = channel.receive()
        if not isinstance(first, Confine):
            return
        has_decord = first.video_reader == "decord" and videos.load_decord()
        if first.video_reader == "decord" and not has_decord:
            sys.stderr.write("decord is not installed; PyAV reads all videos\n")
        _reuse_memory()
        _warm_up()
        _fall_silent()
        # HEIC and decord start threads, nothing else does.
        missing = sandbox.confine(first.memory, threads=has_decord or "HEIF" in images.FORMATS)
        if "seccomp" in missing:
            images.do_without_threads()
            videos.do_without_threads()
        channel.send(Confined(missing))
        while True:
            job, buffers = channel.receive()
            if isinstance(job, Confine) or len(buffers) != 1:
                return
            sandbox.limit_processor(job.seconds)
            channel.send(*answer(job, buffers.pop()))
    except ChannelClosed:
        return


def answer(job: Job, encoded: bytearray) -> tuple[FromWorker, list[Buffer]]:
    """Do one job: the message to send and its buffers."""
    try:
        if isinstance(job, TileJob):
            return _tile(job, encoded)
        if isinstance(job, FramesJob):
            return _frames(job, encoded)
        if job.kind == "video":
            return videos.look_video(encoded, job), []
        return images.look_picture(encoded, job.max_pixels, job.treatment), []
    except images.Unreadable as refusal:
        return Refused(refusal.reason), []
    except MemoryError:
        # Resizing an extreme strip takes more memory than the strip itself.
        return Refused(Reason.TOO_LARGE), []


def _tile(job: TileJob, encoded: bytearray) -> tuple[FromWorker, list[Buffer]]:
    settings, began = job.settings, time.perf_counter()
    if not settings.fast:
        picture = images.open_picture(encoded, job.max_pixels, settings.treatment)
        size = picture.size
    else:
        facts = images.look_picture(encoded, job.max_pixels, settings.treatment)
        size = facts.width, facts.height
        enough = tiling.enough_pixels(size, settings)
        picture = images.open_picture(encoded, job.max_pixels, settings.treatment, enough)
    decoded = time.perf_counter()
    tiles, count, columns, rows = tiling.tile(picture, settings, size)
    spent = decoded - began, time.perf_counter() - decoded
    return Tiled(count, columns, rows, *size, *spent), [tiles]


def _frames(job: FramesJob, encoded: bytearray) -> tuple[FromWorker, list[Buffer]]:
    began = time.perf_counter()
    facts, indices, seconds, pictures = videos.read_frames(encoded, job)
    tiled: list[Tiled] = []
    buffers: list[Buffer] = []
    for picture in pictures:
        decoded = time.perf_counter()
        tiles, count, columns, rows = tiling.tile(picture, job.settings)
        done = time.perf_counter()
        spent = decoded - began, done - decoded
        tiled.append(Tiled(count, columns, rows, picture.width, picture.height, *spent))
        buffers.append(tiles)
        began = done
    return Frames(facts, indices, seconds, tiled), buffers


def _reuse_memory() -> None:
    """Keep up to 64 MiB of freed memory for the next job: to take it from the system page by page
    costs a third of the time of a picture of one megapixel. None is mapped: that is never kept."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc's
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _warm_up() -> None:
    """Decode some pictures and a video, so that whatever their libraries do at first use is done
    now."""
    settings = TileSettings(16, 1, 4, True)
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        sample = io.BytesIO()
        Image.new("RGB", (2, 2)).save(sample, name)
        job = TileJob(settings=settings, max_pixels=4, seconds=1)
        answer(job, bytearray(sample.getvalue()))
    sample = io.BytesIO()
    shades = [Image.new("L", (16, 16), shade) for shade in (0, 99)]
    shades[0].save(sample, "GIF", save_all=True, append_images=shades[1:])
    video = FramesJob(
        settings=settings,
        choice=FrameChoice(2),
        max_pixels=256,
        max_frames=2,
        reader="decord",
        seconds=1,
    )
    answer(video, bytearray(sample.getvalue()))


def _fall_silent() -> None:
    """Give up standard error, which is the server's log: nothing that a hostile picture makes a
    library say, or a hijacked worker, may stand there. Until here it tells why a start failed."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
