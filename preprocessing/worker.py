"""The decode worker: ``python -m preprocessing.worker FD``, one child of the pool each.

Hostile bytes are opened here and nowhere else. It reads one job at a time from the inherited
socket, answers with tiles or a typed refusal, and ends at the socket's end of file. It must
never import a network library, and nothing at all after it has entered its sandbox.
"""

import io
import os
import signal
import socket
import sys

from PIL import Image

from preprocessing import images, sandbox, tiling
from preprocessing.media import (
    Confine,
    Confined,
    FromWorker,
    Job,
    LookJob,
    Reason,
    Refused,
    Tiled,
    TileJob,
    TileSettings,
    ToWorker,
)
from wire.channel import Buffer, Channel, ChannelClosed


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
        _warm_up()
        _fall_silent()
        channel.send(Confined(sandbox.confine(first.memory)))
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
        if isinstance(job, LookJob) and job.kind == "image":
            return images.look_picture(encoded, job.max_pixels, job.treatment), []
        return Refused(Reason.UNSUPPORTED), []
    except images.Unreadable as refusal:
        return Refused(refusal.reason), []
    except MemoryError:
        # Resizing an extreme strip takes more memory than the strip itself.
        return Refused(Reason.TOO_LARGE), []


def _tile(job: TileJob, encoded: bytearray) -> tuple[FromWorker, list[Buffer]]:
    picture = images.open_picture(encoded, job.max_pixels, job.settings.treatment)
    tiles, count, columns, rows = tiling.tile(picture, job.settings)
    return Tiled(count, columns, rows, picture.width, picture.height), [tiles]


def _warm_up() -> None:
    """Decode some pictures, so that whatever their libraries do at first use is done now."""
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        sample = io.BytesIO()
        Image.new("RGB", (2, 2)).save(sample, name)
        job = TileJob(settings=TileSettings(16, 1, 4, True), max_pixels=4, seconds=1)
        answer(job, bytearray(sample.getvalue()))


def _fall_silent() -> None:
    """Give up standard error, which is the server's log: nothing that a hostile picture makes a
    library say, or a hijacked worker, may stand there. Until here it tells why a start failed."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
