"""What the C library keeps of freed memory; each process of ours says how much.

By itself glibc learns to keep pieces of up to 32 MiB for the next time, in holes that do not fit
it, and gives each thread holes of its own.
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of <malloc.h>


def return_what_is_freed(large: int, *, arenas: int = 0) -> None:
    """Have glibc give back pieces of ``large`` bytes as soon as they are freed, and its top when
    that is twice as large. All threads share ``arenas`` heaps; 0: 8 per core, glibc's default.
    Elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, large)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * large)
        if arenas:
            libc.mallopt(_M_ARENA_MAX, arenas)
