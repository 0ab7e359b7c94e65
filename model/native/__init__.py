"""The project's own C for the CPU, called through ctypes.

``LIBRARY`` is None where it was not compiled, or from older sources. Pointers are given as numbers;
what they point to must have the size that the comments in the C state, and nothing here checks it:
their callers are ``model.ops.native``, ``model.attention.native`` and ``model.single``.
"""

import ctypes
from typing import Any

from wire.native import load

VERSION = 12
"""That of the functions' arguments, here and in pool.c: one more with every change of them."""
BEST = 4
"""For ``internvl_choose``: the best instruction set of this processor; tests choose others too."""
LANES, STEP, STEP8 = 16, 32, 64
"""Outputs of a panel, and what inputs are multiples of, in bf16 and quantised (block.h)."""

_p, _l, _i, _f = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class Matrix(ctypes.Structure):
    """A linear layer in panels (``struct matrix``, model/native/kernels.h)."""

    _fields_ = (
        *(
            (name, _p)
            for name in ("panels", "scales", "sums", "bias", "bases", "odd_starts", "odds")
        ),
        ("sketch", _p),
        *((name, _l) for name in ("inputs", "outputs")),
    )


class Sketch(ctypes.Structure):
    """A head once more, in six bits (``struct sketch``)."""

    _fields_ = (("whole", Matrix), ("doubts", _p), ("rest", _l))


_matrix = ctypes.POINTER(Matrix)


class Batch(ctypes.Structure):
    """A step's tokens (``struct batch``)."""

    _fields_ = (
        *((name, _p) for name in ("cosine", "sine", "slots", "tables", "starts", "contexts")),
        ("tasks", _p),
        *((name, _l) for name in ("width", "rows", "tokens")),
    )


class Heads(ctypes.Structure):
    """The sizes of attention (``struct heads``)."""

    _fields_ = tuple((name, _i) for name in ("heads", "kv_heads", "head", "size"))


class Layer(ctypes.Structure):
    """A layer of the decoder (``struct layer``, model/native/decoder.c)."""

    _fields_ = (
        *((name, _p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        ("cache", _p),
    )


class Layers(ctypes.Structure):
    """All of them (``struct decoder``)."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("norm", _p),
        *((name, _l) for name in ("count", "hidden")),
        ("eps", _f),
        ("heads", Heads),
    )


class Single(ctypes.Structure):
    """What steps of one new token per row share (``struct single``, model/native/single.c)."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layers)),
        ("head", _matrix),
        *((name, _p) for name in ("embedding", "cosine", "sine", "tables", "last")),
        *((name, _l) for name in ("hidden", "width")),
        ("heads", Heads),
    )


_batch, _heads = (ctypes.POINTER(kind) for kind in (Batch, Heads))
_ARGUMENTS: dict[str, list[Any]] = {
    "internvl_choose": [_i],
    "internvl_threads": [_i],
    "internvl_large_pages": [_p, ctypes.c_ulong],
    "internvl_pack": [_p, _l, _l, _p, _l],
    "internvl_pack8": [_p, _l, _l, _p, _p, _p, _l],
    "internvl_pack6": [_p, _l, _l, _matrix, _p, _p, _p],
    "internvl_odds": [_p, _l, _l, _l, _p, _p],
    "internvl_pack12": [_p, _l, _l, _l, _p, _p, _p, _p],
    "internvl_linear_scratch": [_matrix, _l],
    "internvl_linear": [_matrix, _p, _l, _l, _p, _l, _i, _p],
    "internvl_draw_scratch": [_matrix, _l],
    "internvl_draw": [_matrix, _p, _l, _l, _p, _p],
    "internvl_add_norm": [_p, _l, _p, _l, _p, _p, _p, _l, _l, _l, _f, _i],
    "internvl_tile_scratch": [_l, _l, _i, _i],
    "internvl_tile_attention": [_p, _l, _l, _l, _i, _i, _p, _p, _l],
    "internvl_head_norms": [_heads, _p, _l, _l, _p, _p, _f],
    "internvl_rotate_write": [_heads, _batch, _p, _l, _p, _p],
    "internvl_attend_tokens": [_i, _i],
    "internvl_attend": [_heads, _batch, _p, _p, _p],
    "internvl_decode_scratch": [ctypes.POINTER(Layers), _l],
    "internvl_single_scratch": [ctypes.POINTER(Single), _l],
    "internvl_single": [ctypes.POINTER(Single), _p, _l, _p, _p, _p],
    "internvl_decode": [ctypes.POINTER(Layers), _batch, _p, _l, _p, _p, _p],
}


def _library() -> Any:
    library = load(__file__, "_kernels", VERSION)
    if library is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = _l
    return library


LIBRARY: Any = _library()
NARROW = LIBRARY is not None and LIBRARY.internvl_choose(BEST) == 3
"""Whether twelve bits a weight pay: measured with AVX512-BF16, and with AMX, where they do not."""
