"""Where a thread spends its time, as text for operators. It takes longer for being watched."""

import cProfile
import io
import pstats

# Functions that a report lists.
LINES = 60


def begin() -> cProfile.Profile:
    """Watch the thread that calls this. Raises ValueError where it is watched already."""
    profiler = cProfile.Profile()
    profiler.enable()
    return profiler


def end(profiler: cProfile.Profile) -> str:
    """Watch no more; what the time went to, most of it first. For the same thread to call."""
    profiler.disable()
    page = io.StringIO()
    pstats.Stats(profiler, stream=page).sort_stats("tottime").print_stats(LINES)
    return page.getvalue()
