"""The front end's view of an engine. Torch-free.

``EngineClient`` is the protocol; ``ProcessEngine`` (an engine in its own process) and
``InprocEngine`` (tests, benchmarks) implement it, and so does the tests' FakeEngine.
"""

import abc
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from engine.streams import Streams
from wire.channel import AsyncChannel, Buffer, ChannelClosed
from wire.errors import EngineFailed, ServiceError, Unavailable
from wire.histogram import Histogram
from wire.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, NAME_VARIABLE
from wire.messages import (
    Control,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Fault,
    Flush,
    FromEngine,
    LogLevel,
    Profile,
    Progress,
    Ready,
    StepReport,
    ToEngine,
)
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

FAULTS = ("load", "step", "hang", "exit")
"""Why an engine was lost: an exception while loading or in a step, silence, or another death."""

# How often the delay between a death and the next start is doubled.
_DOUBLINGS = 5
# What torch's profiler says of itself has not the form of a log line.
_QUIET = {"KINETO_LOG_LEVEL": "99"}
# Seconds in which a process that was killed must be gone.
_KILL_TIMEOUT = 10.0
# In which an engine's silence is counted, per ``engine_timeout``.
_TICKS = 10


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

    past: EngineStats
    """Counters of the engines that were lost."""

    restarts: int
    """How often an engine was replaced."""

    faults: dict[str, int]
    """How often an engine was lost, by cause: see ``FAULTS``."""

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now, or ran last; None: it has no process."""

    @property
    def gaps(self) -> Histogram:
        """Seconds between the arrivals of a request's tokens."""

    @property
    def resumed(self) -> int:
        """How often a request went on in the successor of a lost engine."""

    @property
    def convicted(self) -> int:
        """Requests given up because engines died of them."""

    async def start(self) -> None:
        """Start loading; returns at once."""

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed to start."""

    def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send a request and iterate over its outputs, the last of which has a finish reason.

        Closing the iterator early (``aclose``, or cancellation) aborts the request. When the
        engine is gone for good the iterator raises EngineFailed; nothing waits for ever.
        """

    def abort_all(self, make_error: Callable[[], ServiceError]) -> int:
        """End every open request, each with an error of its own; how many there were."""

    def flush(self) -> None:
        """Let no later request find what the engine has cached until now."""

    def set_log_level(self, level: str) -> None:
        """Log what is that severe, or more, from now on; see the setting ``log_level``."""

    def abort(self, identity: str, error: ServiceError) -> bool:
        """End an open request now; its iterator raises ``error``. Whether there was one."""

    async def profile(self, seconds: float, of: str = "engine") -> bytes:
        """Where the engine's time goes for so long, as ``wire.messages.Profiled`` has it. Raises
        Unavailable where there is no engine in a process of its own, it dies meanwhile, or it has
        nothing to tell."""

    async def stop(self) -> None:
        """End the engine and everything it runs. Idempotent."""


class BaseEngine(abc.ABC):
    """What every client does the same: requests in, outputs back, and the state it is in.

    A subclass has ``_run``, which calls ``_connect`` whenever an engine is ready, and ``_send``,
    which must neither block nor fail.
    """

    def __init__(self, *, max_unread: int = 1 << 15) -> None:
        self.state = "starting"
        self.progress: Progress | None = None
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.past = EngineStats()
        self.restarts = 0
        self.faults = dict.fromkeys(FAULTS, 0)
        self._streams = Streams(self._send, check=self._check, max_unread=max_unread)
        self._settled = asyncio.Event()  # the state is not "starting"
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """It has no process of its own."""
        return None

    @property
    def gaps(self) -> Histogram:
        """Seconds between the arrivals of a request's tokens."""
        return self._streams.gaps

    @property
    def resumed(self) -> int:
        """How often a request went on in the successor of a lost engine."""
        return self._streams.resumed

    @property
    def convicted(self) -> int:
        """Requests given up because engines died of them."""
        return self._streams.convicted

    async def start(self) -> None:
        """Start loading; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine")

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed or was stopped."""
        while self.state == "starting":
            await self._settled.wait()
        if self.state != "ready" or self.ready is None:
            raise Unavailable("the engine could not be started")
        return self.ready

    def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send a request and iterate over its outputs; see EngineClient.

        The iterator raises Unavailable if no engine has been ready yet, or none will be again.
        While one starts again the request waits for it.
        """
        return self._streams.read(request, buffers)

    def _check(self) -> None:
        if self.ready is None or self.state not in ("ready", "starting"):
            raise Unavailable("the engine is not ready", retry_after=5)

    def abort_all(self, make_error: Callable[[], ServiceError]) -> int:
        """End every open request, each with an error of its own; how many there were."""
        return self._streams.abort_all(make_error)

    def flush(self) -> None:
        """Let no later request find what the engine has cached until now."""
        self._tell(Flush())

    def set_log_level(self, level: str) -> None:
        """Log what is that severe, or more, from now on; see the setting ``log_level``."""
        self._tell(LogLevel(level))

    async def profile(self, seconds: float, of: str = "engine") -> bytes:
        """Where the engine's time goes; see EngineClient."""
        raise Unavailable("the engine has no process of its own")

    def _tell(self, message: Control) -> None:
        if self.state == "ready":  # the next one has nothing cached
            self._send(message, ())

    def abort(self, identity: str, error: ServiceError) -> bool:
        """End an open request now; its iterator raises ``error``. Whether there was one."""
        return self._streams.abort(identity, error)

    async def stop(self) -> None:
        """End the engine. Idempotent."""
        self._enter("stopped")
        self._streams.fail(lambda: Unavailable("the server is stopping"))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def _enter(self, state: str) -> None:
        self.state = state
        if state == "starting":
            self._settled.clear()
        else:
            self._settled.set()

    def _connect(self, ready: Ready) -> None:
        if self.state == "stopped":
            return  # it came while the client was being ended
        self.ready = ready
        self._enter("ready")
        self._streams.connect(ready.max_model_len)

    @abc.abstractmethod
    def _send(self, message: ToEngine, buffers: Sequence[Buffer]) -> None: ...

    @abc.abstractmethod
    async def _run(self) -> None: ...


class _Hung(Exception):
    """The engine process lives but does nothing."""


class ProcessEngine(BaseEngine):
    """An engine in a process of its own: starts it, watches it, starts it again when it dies.

    Once an engine has been ready, its death is answered by a fresh process: ``state`` goes back
    to "starting" while it loads, and requests that were in flight go on where they stopped (see
    engine.streams). An engine that says nothing for ``engine_timeout`` seconds although it should
    is ended and counts as dead. The second death in a row waits ``delay`` seconds for its
    successor, each further one twice as long; a request that is answered ends the row.

    A first start that fails leaves the state "failed", and so do ``max_failed_starts`` others in
    a row. ``failure`` then says why, for the operator; it may name files and must not be sent to
    a client.

    ``name`` is what the log calls it, and ``command`` what is started, with the socket's file
    descriptor as one more argument; for ``max_unread`` see engine.streams.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        name: str = "engine",
        log_level: str = "info",
        log_format: str = "text",
        command: Sequence[str] = (sys.executable, "-P", "-m", "engine"),
        max_failed_starts: int = 5,
        delay: float = 1.0,
        stop_timeout: float = 5.0,
        max_unread: int = 1 << 15,
    ) -> None:
        super().__init__(max_unread=max_unread)
        self.failure: str | None = None
        self._name = name
        self._settings = settings
        self._log_level = log_level
        self._log_format = log_format
        self._command = command
        self._max_failed_starts = max_failed_starts
        self._delay = delay
        self._stop_timeout = stop_timeout
        self._deaths = 0  # in a row, without an answer between them
        self._failed_starts = 0  # in a row
        self._suspects: Sequence[str] = ()
        self._fault: str | None = None  # the kind that the engine itself named
        self._heard = 0  # messages
        self._outbox: asyncio.Queue[tuple[object, Sequence[Buffer]]] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None
        self._profiled: asyncio.Future[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine that runs now, or ran last."""
        return self._process.pid if self._process is not None else None

    async def stop(self) -> None:
        """End the engine process, by force after ``stop_timeout`` seconds. Idempotent."""
        self._end_profile()
        await super().stop()
        if self._process is not None:
            await self._reap(self._process)  # again, if it was the reaping that was cut short

    def set_log_level(self, level: str) -> None:
        """See EngineClient."""
        self._log_level = level
        super().set_log_level(level)

    async def profile(self, seconds: float, of: str = "engine") -> bytes:
        """Where the engine's time goes; see EngineClient."""
        if self.state != "ready":
            raise Unavailable("the engine is not ready")
        profiled: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._profiled = profiled
        self._tell(Profile(on=True, of=of))
        try:
            await asyncio.wait({profiled}, timeout=seconds)
        finally:
            self._tell(Profile(on=False))
        if not (seen := await profiled):
            raise Unavailable("the engine could not take a profile; its log says why")
        return seen

    def _send(self, message: ToEngine, buffers: Sequence[Buffer]) -> None:
        self._outbox.put_nowait((message, buffers))

    async def _run(self) -> None:
        try:
            while await self._live_and_die():
                self.restarts += 1
                if self._deaths > 1:
                    await asyncio.sleep(self._delay * 2 ** min(self._deaths - 2, _DOUBLINGS))
        except Exception:
            logger.exception("the engine cannot be watched")
        self._enter("failed")
        self._streams.fail(lambda: EngineFailed("the engine failed during this request"))

    async def _live_and_die(self) -> bool:
        """One engine process, from its start to its death; whether there should be another."""
        self.failure = self._fault = None
        self._suspects = ()
        self._failed_starts += 1  # until it is ready
        try:
            await self._live()
        except Exception as error:
            self._lose(error)
        logger.error("the %s is gone: %s", self._name, self.failure)
        return self.ready is not None and self._failed_starts < self._max_failed_starts

    async def _live(self) -> None:
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
        work = [self._read(channel), self._write(channel), self._watch()]
        tasks = [asyncio.create_task(part) for part in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            self._lose(next(error for t in tasks if t.done() and (error := t.exception())))
        finally:
            for task in tasks:
                task.cancel()
            channel.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._reap(process)

    async def _spawn(self, sock: socket.socket) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            str(sock.fileno()),
            pass_fds=[sock.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            env=environment()
            | {LEVEL_VARIABLE: self._log_level, FORMAT_VARIABLE: self._log_format}
            | {NAME_VARIABLE: self._name}
            | _QUIET,
        )

    async def _read(self, channel: AsyncChannel[FromEngine]) -> NoReturn:
        while True:
            message, _ = await channel.receive()
            self._heard += 1
            self._take(message)

    async def _write(self, channel: AsyncChannel[FromEngine]) -> None:
        with contextlib.suppress(ChannelClosed):  # ``_read`` sees it too, after the last words
            await channel.send(self._settings)
            while True:
                message, buffers = await self._outbox.get()
                await channel.send(message, buffers)

    async def _watch(self) -> NoReturn:
        """Raise when the engine has owed something for ``engine_timeout`` and said nothing."""
        timeout = self._settings.engine_timeout
        silent = 0
        while silent < _TICKS:
            heard = self._heard
            await asyncio.sleep(timeout / _TICKS)
            owes = self.state == "starting" or self._streams.at_work
            silent = silent + 1 if owes and self._heard == heard else 0
        raise _Hung(f"it has said nothing for {timeout:g} seconds (engine_timeout)")

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, StepReport):
            self.stats = message.stats
            if any(output.finish_reason in ("stop", "length") for output in message.outputs):
                self._deaths = 0
            self._streams.deal(message)
        elif isinstance(message, Progress):
            self.progress = message
        elif isinstance(message, Ready):
            self._failed_starts = 0
            self.stats = EngineStats(blocks_total=message.blocks_total)
            self._connect(message)
        elif isinstance(message, Fault):
            self.failure = f"{message.kind}: {message.text}"
            self._fault = message.kind
            self._suspects = message.suspects
        elif self._profiled is not None and not self._profiled.done():
            self._profiled.set_result(message.seen)

    def _lose(self, error: BaseException) -> None:
        """The engine is dead, or has to die."""
        self._end_profile()
        if not isinstance(error, ChannelClosed | _Hung):
            logger.error("the engine cannot be used", exc_info=error)
        self.failure = self.failure or f"{error}"
        self.past, self.stats = self.stats.behind(self.past), EngineStats()
        if self.state == "stopped":
            return
        kind = "hang" if isinstance(error, _Hung) else self._fault
        self.faults[kind if kind in FAULTS else "exit"] += 1
        self._deaths += 1
        self._enter("starting")
        self._streams.disconnect(self._suspects)

    def _end_profile(self) -> None:
        if self._profiled is not None and not self._profiled.done():
            self._profiled.set_exception(Unavailable("the engine died meanwhile"))

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout)
        except TimeoutError:
            logger.warning("the engine process does not leave; killing it")
            process.kill()
            # One that the kernel cannot end must not hold up its successor.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _KILL_TIMEOUT)


def environment() -> dict[str, str]:
    """For processes that run the same code: ours, and the folder of this package first on the
    path; without what OpenTelemetry is told, which may be keys."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    kept = {name: text for name, text in os.environ.items() if not name.startswith("OTEL_")}
    return {**kept, "PYTHONPATH": os.pathsep.join([root, path] if path else [root])}
