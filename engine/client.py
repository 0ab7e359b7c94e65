"""The front end's view of an engine. Torch-free.

``EngineClient`` is the protocol; ``ProcessEngine`` (an engine in its own process) and
``InprocEngine`` (tests, benchmarks) implement it, and so does the tests' FakeEngine.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from wire.channel import Buffer
from wire.messages import EngineOutput, EngineRequest, EngineStats, Progress, Ready


class EngineClient(Protocol):
    """Submit requests, read their outputs, know whether the engine lives."""

    state: str
    """One of "starting", "ready", "failed", "stopped"."""

    progress: Progress | None
    """The last start-up progress."""

    ready: Ready | None
    """What the engine said when it became ready; None before."""

    stats: EngineStats
    """From the last step report."""

    async def start(self) -> None:
        """Start loading; returns at once."""

    async def wait_ready(self) -> Ready:
        """Wait until the engine can serve. Raises Unavailable when it failed to start."""

    def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncIterator[EngineOutput]:
        """Send a request and iterate over its outputs, the last of which has a finish reason.

        Closing the iterator early (``aclose``, or cancellation) aborts the request. When the
        engine is gone the iterator raises EngineFailed; nothing waits for ever.
        """

    async def stop(self) -> None:
        """End the engine and everything it runs. Idempotent."""
