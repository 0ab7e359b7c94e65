"""Kernels in Triton for CUDA devices. Nothing here is imported where there is no such device.

A kernel is compiled at its first call. Under ``TRITON_INTERPRET=1`` the same code runs on tensors
of the CPU instead, a block at a time in numpy; that is how the tests check it without a GPU. The
modules hold kernels and the functions that launch them, and know nothing of the model around.
"""

import functools
import importlib.util

import torch


def missing(device: torch.device) -> str | None:
    """What keeps kernels from running on a device, or None."""
    return _fault() if device.type == "cuda" else "it needs cuda"


@functools.cache
def _fault() -> str | None:
    """A small kernel is tried: compiling takes a C compiler, Python's headers and a folder to write
    to, which a machine that can otherwise compute may lack."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from model.triton import fused

        fused.silu_mul(torch.ones(1, 2, device="cuda"))
    except Exception as error:  # whatever compilers and drivers come up with
        return f"triton fails here ({(str(error) or repr(error)).splitlines()[0]})"
    return None
