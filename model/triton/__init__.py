"""Kernels in Triton for CUDA devices. Nothing here is imported where there is no such device.

A kernel is compiled at its first call. Under ``TRITON_INTERPRET=1`` the same code runs on tensors
of the CPU instead, a block at a time in numpy; that is how the tests check it without a GPU. The
modules hold kernels and the functions that launch them, and know nothing of the model around.
"""

import functools
import importlib.util
import os
import shutil


@functools.cache
def missing() -> str | None:
    """What keeps kernels from being compiled here, or None. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler to start kernels, and there is no gcc or clang"
    return None
