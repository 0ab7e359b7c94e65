"""Profiles of the engine, for operators: the calls of its thread as text, or the operations and
kernels of some steps as a trace. Belongs to the step loop; whatever goes wrong with a profile, the
engine goes on."""

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from wire import profiling

logger = logging.getLogger(__name__)

# A step of a large model has some ten thousand events of a kilobyte each, before they are packed.
TRACED_STEPS = 32
MOST_BYTES = 256 << 20


class Watch:
    """One profile, from its beginning; ``of`` is "engine" or "model"."""

    def __init__(self, of: str) -> None:
        self._end: Callable[[], bytes] | None = None
        self._steps_left = TRACED_STEPS if of == "model" else math.inf
        try:
            self._end = _trace() if of == "model" else _calls()
        except Exception:
            logger.exception("no profile can be taken")

    def step(self) -> bool:
        """Count a step; whether there may be more."""
        self._steps_left -= 1
        return self._steps_left > 0

    def end(self) -> bytes:
        """What was seen; nothing where that failed or is too large."""
        try:
            seen = b"" if self._end is None else self._end()
        except Exception:
            logger.exception("a profile cannot be written")
            return b""
        if len(seen) > MOST_BYTES:
            logger.error("a profile has %d bytes, and may have %d", len(seen), MOST_BYTES)
            return b""
        return seen


def _calls() -> Callable[[], bytes]:
    profiler = profiling.begin()
    return lambda: profiling.end(profiler).encode()


def _trace() -> Callable[[], bytes]:
    """A gzipped Chrome trace: JSON of the Trace Event Format."""
    import torch  # late: the stub engines of tests do without

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()

    def end() -> bytes:
        profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(file))
            return file.read_bytes()

    return end
