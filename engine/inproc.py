"""The engine client over an EngineCore in this process, for tests and benchmarks.

Steps run in one thread, so that the event loop stays free, and only that thread touches the
core. Nothing is started again here: a step that fails leaves the state "failed".
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.client import Streams
from engine.core import EngineCore, MakeRunner
from wire.channel import Buffer
from wire.errors import EngineFailed, Unavailable
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Progress,
    Ready,
    StepReport,
)
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

Message = tuple[EngineRequest | Abort, Sequence[Buffer]]


class InprocEngine:
    """Implements ``engine.client.EngineClient``; ``make_runner`` loads the model."""

    def __init__(self, settings: EngineSettings, make_runner: MakeRunner) -> None:
        self.state = "starting"
        self.progress: Progress | None = None
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self._settings = settings
        self._make_runner = make_runner
        self._streams = Streams()
        self._inbox: list[Message] = []
        self._arrived = asyncio.Event()
        self._settled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start loading; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine")

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed or was stopped."""
        await self._settled.wait()
        if self.state != "ready" or self.ready is None:
            raise Unavailable("the engine could not be started")
        return self.ready

    async def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send a request and iterate over its outputs; see EngineClient."""
        if self.state != "ready":
            raise Unavailable("the engine is not ready", retry_after=5)
        async with contextlib.aclosing(self._streams.read(self._send, request, buffers)) as outputs:
            async for output in outputs:
                yield output

    async def stop(self) -> None:
        """Finish the step that runs, and no other. Idempotent."""
        self._enter("stopped")
        self._streams.fail(lambda: Unavailable("the server is stopping"))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await asyncio.to_thread(self._thread.shutdown)

    def _send(self, message: EngineRequest | Abort, buffers: Sequence[Buffer]) -> None:
        self._inbox.append((message, buffers))
        self._arrived.set()

    def _enter(self, state: str) -> None:
        self.state = state
        self._settled.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            core, self.ready = await loop.run_in_executor(self._thread, self._load)
            self._enter("ready")
            while True:
                if not (self._inbox or core.has_work):
                    self._arrived.clear()
                    await self._arrived.wait()
                inbox, self._inbox = self._inbox, []
                report = await loop.run_in_executor(self._thread, _step, core, inbox)
                if report is not None:
                    self.stats = report.stats
                    self._streams.deal(report.outputs)
        except Exception:
            logger.exception("the engine fails")
            self._enter("failed")
            self._streams.fail(lambda: EngineFailed("the engine failed during this request"))

    def _load(self) -> tuple[EngineCore, Ready]:
        runner = self._make_runner(self._settings, self._report_progress)
        ready = runner.ready()
        return EngineCore(self._settings, runner, ready), ready

    def _report_progress(self, progress: Progress) -> None:
        self.progress = progress


def _step(core: EngineCore, inbox: Sequence[Message]) -> StepReport | None:
    for message, buffers in inbox:
        core.take(message, buffers)
    return core.step()
