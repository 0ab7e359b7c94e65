"""Finds the libraries that were compiled from this project's C when it was installed.

They are plain shared libraries, called through ctypes. They are optional: an installation without
a C compiler has none, and whoever asks here has another way to do the same.
"""

import ctypes
import importlib.machinery
from pathlib import Path


def load(beside: str, name: str) -> ctypes.CDLL | None:
    """The library ``name`` beside the module whose ``__file__`` is given; None without one.

    None also where it cannot be loaded, as one from another machine's disk.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(beside).parent / (name + suffix)
        if file.exists():
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None
