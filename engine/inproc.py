"""The engine client over an EngineCore in this process, for tests and benchmarks.

Steps run in one thread, so that the event loop stays free, and only that thread touches the
core. Nothing is started again here: a step that fails leaves the state "failed".
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.client import BaseEngine
from engine.core import EngineCore, MakeRunner
from wire.channel import Buffer
from wire.errors import EngineFailed
from wire.messages import Fault, Progress, Ready, StepReport, ToEngine
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

Message = tuple[ToEngine, Sequence[Buffer]]


class InprocEngine(BaseEngine):
    """Implements ``engine.client.EngineClient``; ``make_runner`` loads the model."""

    def __init__(self, settings: EngineSettings, make_runner: MakeRunner) -> None:
        super().__init__()
        self._settings = settings
        self._make_runner = make_runner
        self._inbox: list[Message] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")

    async def stop(self) -> None:
        """Finish the step that runs, and no other. Idempotent."""
        await super().stop()
        await asyncio.to_thread(self._thread.shutdown)

    def _send(self, message: ToEngine, buffers: Sequence[Buffer]) -> None:
        self._inbox.append((message, buffers))
        self._arrived.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            core, ready = await loop.run_in_executor(self._thread, self._load)
            self._connect(ready)
            while True:
                if not (self._inbox or core.has_work):
                    self._arrived.clear()
                    await self._arrived.wait()
                inbox, self._inbox = self._inbox, []
                report = await loop.run_in_executor(self._thread, _step, core, inbox)
                if report is not None:
                    self.stats = report.stats
                    self._streams.deal(report)
        except Exception:
            logger.exception("the engine fails")
            self._enter("failed")
            self._streams.fail(lambda: EngineFailed("the engine failed during this request"))

    def _load(self) -> tuple[EngineCore, Ready]:
        runner = self._make_runner(self._settings, self._report_progress)
        ready = runner.ready()
        return EngineCore(self._settings, runner, ready), ready

    def _report_progress(self, message: Progress | Fault) -> None:
        if isinstance(message, Progress):
            self.progress = message


def _step(core: EngineCore, inbox: Sequence[Message]) -> StepReport | None:
    for message, buffers in inbox:
        core.take(message, buffers)
    return core.step()
