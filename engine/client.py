"""The front end's view of an engine. Torch-free.

``EngineClient`` is the protocol; ``ProcessEngine`` (an engine in its own process) and
``InprocEngine`` (tests, benchmarks) implement it, and so does the tests' FakeEngine.
"""

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from wire.channel import AsyncChannel, Buffer, ChannelClosed
from wire.errors import EngineFailed, ServiceError, Unavailable
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Fault,
    FromEngine,
    Progress,
    Ready,
    StepReport,
)
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

Send = Callable[[EngineRequest | Abort, Sequence[Buffer]], None]


class EngineClient(Protocol):
    """Submit requests, read their outputs, know whether the engine lives."""

    state: str
    """One of "starting", "ready", "failed", "stopped"."""

    progress: Progress | None
    """The last start-up progress."""

    ready: Ready | None
    """What the engine said when it became ready; None before."""

    stats: EngineStats
    """From the last step report; zeros while no engine is there to report."""

    async def start(self) -> None:
        """Start loading; returns at once."""

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed to start."""

    def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send a request and iterate over its outputs, the last of which has a finish reason.

        Closing the iterator early (``aclose``, or cancellation) aborts the request. When the
        engine is gone the iterator raises EngineFailed; nothing waits for ever.
        """

    async def stop(self) -> None:
        """End the engine and everything it runs. Idempotent."""


class _Stream:
    """Outputs of one request on their way to its reader, and what ended them early."""

    def __init__(self) -> None:
        self.outputs: list[EngineOutput] = []
        self.error: ServiceError | None = None
        self.arrived = asyncio.Event()


class Streams:
    """The open requests of one client: deals out reports, one wake-up per request and step.

    A reader that is slow finds all its outputs at once; nothing is dropped and nobody else
    waits for it.
    """

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    async def read(
        self, send: Send, request: EngineRequest, buffers: Sequence[Buffer]
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send ``request``, yield its outputs, and send an Abort if the reader leaves early.

        ``send`` must neither block nor fail. Ids must be unique among the open requests.
        """
        if request.id in self._streams:
            raise ValueError("a request with this id is open")
        stream = self._streams[request.id] = _Stream()
        ended = False
        try:
            send(request, buffers)
            while not ended:
                await stream.arrived.wait()
                stream.arrived.clear()
                outputs, stream.outputs = stream.outputs, []
                for output in outputs:
                    ended = output.finish_reason is not None
                    yield output
                if stream.error is not None and not ended:
                    ended = True
                    raise stream.error
        finally:
            # Absent if ``fail`` has closed it, in which case nobody is there to be told.
            if self._streams.pop(request.id, None) is not None and not ended:
                send(Abort([request.id]), ())

    def deal(self, outputs: Sequence[EngineOutput]) -> None:
        """Hand each output to its reader; those of aborted requests are dropped."""
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                stream.outputs.append(output)
                stream.arrived.set()

    def fail(self, make_error: Callable[[], ServiceError]) -> None:
        """End every open request with an error of its own, after the outputs already dealt."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.error = make_error()
            stream.arrived.set()


class ProcessEngine:
    """An engine in a process of its own: starts it, watches it, starts it again when it dies.

    Once an engine has been ready, its death is answered by a fresh process: ``state`` goes back
    to "starting" while it loads. Requests that were in flight fail with EngineFailed, they are
    not resumed. ``max_deaths`` within ``death_window`` seconds leave the state "failed", and so
    does a first start that fails. ``failure`` then says why, for the operator; it may name files
    and must not be sent to a client.

    ``command`` is what is started, with the socket's file descriptor as one more argument.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        command: Sequence[str] = (sys.executable, "-P", "-m", "engine"),
        max_deaths: int = 3,
        death_window: float = 60.0,
        stop_timeout: float = 5.0,
    ) -> None:
        self.state = "starting"
        self.progress: Progress | None = None
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.restarts = 0
        self._settings = settings
        self._command = command
        self._max_deaths = max_deaths
        self._death_window = death_window
        self._stop_timeout = stop_timeout
        self._deaths: deque[float] = deque()
        self._streams = Streams()
        self._outbox: asyncio.Queue[tuple[object, Sequence[Buffer]]] = asyncio.Queue()
        self._settled = asyncio.Event()  # the state is not "starting"
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now, or ran last."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start loading; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name="engine")

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed or was stopped."""
        while self.state == "starting":
            await self._settled.wait()
        if self.state != "ready" or self.ready is None:
            raise Unavailable("the engine could not be started")
        return self.ready

    async def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send a request and iterate over its outputs; see EngineClient.

        Raises Unavailable if the engine is not ready, EngineFailed if it dies on the way. An id
        must not be used twice.
        """
        if self.state != "ready":
            raise Unavailable("the engine is not ready", retry_after=5)
        async with contextlib.aclosing(self._streams.read(self._send, request, buffers)) as outputs:
            async for output in outputs:
                yield output

    async def stop(self) -> None:
        """End the engine process, by force after ``stop_timeout`` seconds. Idempotent."""
        self._enter("stopped")
        self._streams.fail(lambda: Unavailable("the server is stopping"))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _send(self, message: EngineRequest | Abort, buffers: Sequence[Buffer]) -> None:
        self._outbox.put_nowait((message, buffers))

    def _enter(self, state: str) -> None:
        self.state = state
        if state == "starting":
            self._settled.clear()
        else:
            self._settled.set()

    async def _supervise(self) -> None:
        while True:
            try:
                await self._live()
            except Exception as error:
                self._lose(f"the engine process cannot be run: {error}")
            logger.error("the engine is gone: %s", self.failure)
            if not self._may_restart():
                self._enter("failed")
                return
            self.restarts += 1

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._death_window:
            self._deaths.popleft()
        return self.ready is not None and len(self._deaths) < self._max_deaths

    def _lose(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.stats = EngineStats()
        self._enter("starting")
        self._streams.fail(lambda: EngineFailed("the engine failed during this request"))

    async def _live(self) -> None:
        """One engine process, from its start to its death; ``failure`` says how it died."""
        self.failure = None
        self._outbox = asyncio.Queue()
        ours, theirs = socket.socketpair()
        with theirs:
            channel: AsyncChannel[FromEngine] = await AsyncChannel.open(ours, FromEngine)
            try:
                process = self._process = await self._spawn(theirs)
            except BaseException:
                channel.close()
                raise
        # Nothing is awaited before the try: a stop at any moment must find the process reaped.
        writer = asyncio.create_task(self._write(channel), name="engine-outbox")
        try:
            while True:
                message, _ = await channel.receive()
                self._take(message)
        except ChannelClosed as error:
            self._lose(str(error))
        finally:
            writer.cancel()
            channel.close()
            await self._reap(process)

    async def _spawn(self, sock: socket.socket) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            str(sock.fileno()),
            pass_fds=[sock.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env=_environment(),
        )

    async def _write(self, channel: AsyncChannel[FromEngine]) -> None:
        with contextlib.suppress(ChannelClosed):  # ``_live`` sees the end of file too
            await channel.send(self._settings)
            while True:
                message, buffers = await self._outbox.get()
                await channel.send(message, buffers)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, StepReport):
            self.stats = message.stats
            self._streams.deal(message.outputs)
        elif isinstance(message, Progress):
            self.progress = message
        elif isinstance(message, Ready):
            self.ready = message
            self._enter("ready")
        elif isinstance(message, Fault):
            self.failure = f"{message.kind}: {message.text}"

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout)
        except TimeoutError:
            logger.warning("the engine process does not leave; killing it")
            process.kill()
            await process.wait()


def _environment() -> dict[str, str]:
    """Ours, and the folder of this package first on the path: the child runs the same code."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, path] if path else [root])}
