"""Finds the libraries that were compiled from this project's C when it was installed.

They are plain shared libraries, called through ctypes. They are optional: an installation without
a C compiler has none, and whoever asks here has another way to do the same. A library left over
from older sources is no better than none: its functions would take other arguments.
"""

import ctypes
import importlib.machinery
from pathlib import Path


def load(beside: str, name: str, version: int) -> ctypes.CDLL | None:
    """The library ``name`` beside the module whose ``__file__`` is given; None without one.

    None also where it cannot be loaded, as one from another machine's disk, and where its
    ``internvl_version`` is not the one that is asked for.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(beside).parent / (name + suffix)
        if file.exists():
            try:
                library = ctypes.CDLL(str(file))
                if library.internvl_version() == version:
                    return library
            except (OSError, AttributeError):
                continue
    return None
