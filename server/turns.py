"""Short turns on the processor for the thread that answers clients.

While the engine computes on every core, a thread that wakes up to pass on a token waits until one
of the engine's has had its turn, up to 3 ms. Linux lets a thread ask for shorter turns (from 6.12
on): its share stays what it was, and it comes sooner.
"""

import ctypes
import platform
import sys

_CALLS = {"x86_64": (315, 314), "aarch64": (275, 274)}  # sched_getattr, sched_setattr
_RESET_ON_FORK = 1  # the engine and the decode workers have turns of the usual length
_SHORT = 100_000  # nanoseconds, the least that Linux takes


class _Attributes(ctypes.Structure):
    """``struct sched_attr``, its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def take_short_turns() -> bool:
    """Ask for them for this thread; whether it could be asked. Elsewhere nothing changes."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    get, put = _CALLS[platform.machine()]
    system = ctypes.CDLL(None).syscall
    found = _Attributes()
    size = ctypes.sizeof(found)
    if system(get, 0, ctypes.byref(found), size, 0) or found.policy or found.nice < 0:
        return False  # or somebody chose something else, which what it starts would lose
    found.size, found.runtime = size, _SHORT
    found.flags |= _RESET_ON_FORK
    return bool(system(put, 0, ctypes.byref(found), 0) == 0)
