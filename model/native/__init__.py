"""The project's own C for the CPU, called through ctypes.

``LIBRARY`` is None where it was not compiled. Pointers are given as numbers; what they point to
must have the size that the comments in the C state, and nothing here checks it:
``model.ops.native`` and ``model.attention.native`` are the callers.
"""

import ctypes
from typing import Any

from wire.native import load

BEST = 4
"""For ``internvl_choose``: the best instruction set of this processor; tests choose others too."""
LANES, STEP, STEP8 = 16, 32, 64
"""Outputs of a panel, and what inputs are multiples of, in bf16 and quantised (block.h)."""

_p, _l, _i, _f = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "internvl_choose": [_i],
    "internvl_threads": [_i],
    "internvl_large_pages": [_p, ctypes.c_ulong],
    "internvl_pack": [_p, _l, _l, _p, _l],
    "internvl_pack8": [_p, _l, _l, _p, _p, _p, _l],
    "internvl_linear": [_p, _l, _l, _p, _p, _l, _l, _p, _l, _i],
    "internvl_linear8": [_p, _l, _l, _p, _p, _p, _p, _l, _l, _p, _l, _i, _p, _p],
    "internvl_add_norm": [_p, _l, _p, _l, _p, _p, _p, _l, _l, _l, _f, _i],
    "internvl_tile_scratch": [_l, _l, _i, _i],
    "internvl_tile_attention": [_p, _l, _l, _l, _i, _i, _p, _p, _l],
    "internvl_rotate_write": [_p, _l, _p, _p, _p, _p, _p, _l, _i, _i, _i, _i],
    "internvl_attend_tokens": [_i, _i],
    "internvl_attend": [_p, _p, _p, _l, _p, _p, _p, _l, _i, _i, _i, _i, _p],
}


def _library() -> Any:
    library = load(__file__, "_kernels")
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _l
        library.internvl_choose(BEST)
    return library


LIBRARY: Any = _library()
