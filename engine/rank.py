"""``python -m engine.rank FD PARENT [MODEL]``: a rank other than the first, for ``engine.ranks`` or
``engine.node`` to start; not for people.

FD is a socket to rank 0, whose orders it obeys; PARENT the process that started this one. MODEL is
the checkpoint folder on this host, if it is not where it is on rank 0's. The process leaves when
the socket closes or its parent ends, at whatever moment: when it waits for a rank that has died,
too.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from engine.core import Runner
from engine.network import local_address, use_interface
from engine.orders import (
    Begin,
    Failed,
    Finish,
    Join,
    Loaded,
    Refusal,
    Sample,
    ToRank,
    Upload,
)
from engine.process import Inbox, end_with_parent
from wire import logs
from wire.channel import Channel, ChannelClosed
from wire.digest import checkpoint_digest
from wire.errors import Unservable
from wire.knob import SettingError
from wire.messages import LogLevel, Progress

logger = logging.getLogger("engine.rank")  # not "__main__"

# Seconds in which rank 0, if it fails too, ends this process; so that one of them tells of it.
_AFTER_RANK_0 = 1.5


def load_part(
    join: Join, progress: Callable[[Progress], None], listener: socket.socket | None = None
) -> Runner:
    """Meet the other ranks and load this one's part of the model, as all do at the same time.

    ``listener`` is where rank 0 lets the others meet. Raises what ``ModelRunner`` does.
    """
    import torch

    from engine.choices import default_threads
    from engine.runner import ModelRunner
    from model import load_config, parallel, stages

    settings = join.settings
    device = torch.device(settings.device)
    if device.type == "cuda":
        if (found := torch.cuda.device_count()) < join.each:
            raise SettingError(f"{join.each} processes need as many CUDA devices; here are {found}")
        device = torch.device("cuda", join.index)
    config = load_config(Path(settings.model))
    # Or say now that it cannot be.
    parallel.share(config.text, settings.tensor_parallel_size)
    stages.check_stages(config.text.layers, settings.pipeline_parallel_size)
    threads = max(1, default_threads(config) // join.each)
    settings = dataclasses.replace(settings, threads=settings.threads or threads)
    group = parallel.join(
        join.rank,
        join.size,
        join.address,
        device,
        listener,
        settings.pipeline_parallel_size,
        share_memory=settings.symmetric_memory,
    )
    return ModelRunner(settings, progress, group)


def serve(sock: socket.socket, model: str) -> int:
    """Be the rank that rank 0, at the other end of the socket, says; returns the exit status."""
    channel: Channel[ToRank] = Channel(sock, ToRank)
    try:
        first, _ = channel.receive()
    except ChannelClosed:
        return 0
    if not isinstance(first, Join):
        logger.error("refused: %s", first.why if isinstance(first, Refusal) else "by mistake")
        return 1
    logs.setup(first.log_level, f"rank{first.rank}", first.log_format)
    inbox = Inbox(channel)
    try:
        if sock.family != socket.AF_UNIX:
            use_interface(local_address(sock))
        runner = load_part(_at_home(first, model), channel.send)
        channel.send(Loaded())
        _obey(runner, inbox)
    except ChannelClosed:
        return 0
    except Exception as error:
        time.sleep(_AFTER_RANK_0)
        logger.error("the rank fails", exc_info=not isinstance(error, Unservable))
        with contextlib.suppress(ChannelClosed):
            channel.send(Failed(f"{type(error).__name__}: {error}"))
    return 1


def _at_home(join: Join, model: str) -> Join:
    """With the checkpoint of this host, which must be the same."""
    folder = model or join.settings.model
    if checkpoint_digest(Path(folder)) != join.checkpoint:
        raise Unservable(f"the checkpoint of rank 0 is not in {folder} on this host")
    return msgspec.structs.replace(join, settings=dataclasses.replace(join.settings, model=folder))


def _obey(runner: Runner, inbox: Inbox[ToRank]) -> NoReturn:
    while True:
        for order, buffers, _ in inbox.take(wait=True):
            if isinstance(order, Begin):
                logger.debug("step %d", order.plan.step)
                runner.begin(order.plan)
            elif isinstance(order, Sample):
                runner.sample()
            elif isinstance(order, Finish):
                runner.finish()
            elif isinstance(order, Upload):
                runner.upload(order.request, buffers)
            elif isinstance(order, LogLevel):
                logging.getLogger().setLevel(order.level.upper())


def main() -> None:
    """Obey the socket named on the command line."""
    level, form = os.environ.get(logs.LEVEL_VARIABLE), os.environ.get(logs.FORMAT_VARIABLE)
    logs.setup(level or "info", "rank", form or "text")
    descriptor, parent, *model = sys.argv[1:]
    end_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    status = serve(socket.socket(fileno=int(descriptor)), model[0] if model else "")
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
