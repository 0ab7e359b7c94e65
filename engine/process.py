"""The engine process: an inbox thread, a step loop, and a socket to the front end.

``python -m engine`` calls ``serve``. The first frame from the front end holds the settings, then
requests and aborts follow; Progress, Ready, a StepReport per step, or a Fault go back. The front
end manages this process's life by the socket alone: when it closes, at whatever moment, the
process exits at once.
"""

import contextlib
import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Generic, NoReturn, TypeVar

from engine.core import EngineCore, MakeRunner
from engine.watch import Watch
from wire.channel import Channel, ChannelClosed
from wire.errors import Unservable
from wire.messages import Fault, Profile, Profiled, ToEngine
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

Arrival = tuple[T, list[bytearray], float]
"""A message, its buffers, and the ``time.monotonic`` at which it was there."""

_PR_SET_PDEATHSIG = 1


class Inbox(Generic[T]):
    """Messages from whom this process works for, read by a thread of its own so that a step delays
    none.

    Its end of file ends the process on the spot, mid-step or mid-load: nothing here outlives
    the other end, and there is nothing to save. Whatever else ends the thread is raised by
    ``take``, so that the step loop never waits for a reader that is gone.
    """

    def __init__(self, channel: Channel[T]) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[Arrival[T] | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message, buffers = self._channel.receive()
                self._queue.put((message, buffers, time.monotonic()))
        except ChannelClosed as reason:
            logger.info("leaving: %s", reason)
            os._exit(0)
        except Exception as error:
            self._queue.put(error)

    def take(self, *, wait: bool) -> Iterator[Arrival[T]]:
        """Yield what has arrived; with ``wait``, block until there is at least one message."""
        while True:
            try:
                arrived = self._queue.get(block=wait)
            except queue.Empty:
                return
            if isinstance(arrived, Exception):
                raise arrived
            wait = False
            yield arrived


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process with the one of that id, which has started it: a second net
    under the socket's end of file, for one that is stuck in a library call meanwhile."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was too late for that
        os._exit(0)


def serve(sock: socket.socket, make_runner: MakeRunner) -> int:
    """Run an engine for the front end at the other end of ``sock``; returns the exit status."""
    # A terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group; the front end drains
    # first and closes the socket when it wants this process gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        settings, _ = Channel[EngineSettings](sock, EngineSettings).receive()
    except ChannelClosed:
        return 0
    channel: Channel[ToEngine] = Channel(sock, ToEngine)
    inbox = Inbox(channel)
    core = None
    try:
        runner = make_runner(settings, channel.send)
        ready = runner.ready()
        core = EngineCore(settings, runner, ready)
        channel.send(ready)
        _run(core, inbox, channel)
    except ChannelClosed:
        return 0
    except Exception as error:
        logger.error("the engine fails", exc_info=not isinstance(error, Unservable))
        if core is not None:
            core.log_suspects()
        text = f"{type(error).__name__}: {error}"
        fault = Fault("step", text, core.suspects) if core else Fault("load", text)
        with contextlib.suppress(ChannelClosed):
            channel.send(fault)
    return 1


def _run(core: EngineCore, inbox: Inbox[ToEngine], channel: Channel[ToEngine]) -> NoReturn:
    """Step while there is work, sleep on the inbox while there is none."""
    watch: Watch | None = None
    while True:
        for message, buffers, came in inbox.take(wait=not core.has_work):
            if not isinstance(message, Profile):
                core.take(message, buffers, came)
            elif message.on:
                watch = watch or Watch(message.of)
            elif watch is not None:
                channel.send(Profiled(watch.end()))
                watch = None
        report = core.step()
        if report is not None:
            channel.send(report)
        if watch is not None and report is not None and not watch.step():
            channel.send(Profiled(watch.end()))
            watch = None
