"""Read a file that a client names: a regular one inside the folder that the operator allows.

Nothing outside that folder is touched, a link out of it is not followed, and what was checked is
what is read, even while somebody changes the folder. The fetcher calls this in a thread.
"""

import os
import re
import stat
import urllib.parse

from preprocessing.incoming import Incoming

_HEAD = re.compile(r"file://(?:localhost)?/", re.IGNORECASE)
_SEGMENT = re.compile(r"(?:[^%?#]|%[0-9a-fA-F]{2})+")
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
# Opening a pipe must not wait for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_CHUNK = 1 << 20


def read_file(url: str, folder: str, part: Incoming) -> None:
    """Add the file's bytes to ``part``.

    Raises MediaRefused over its limits, and OSError or ValueError for everything that is no
    readable regular file inside ``folder``; a client must not see which of them it was.
    """
    root = os.path.realpath(os.fsencode(folder))
    path = _path(url)
    # Asked before the path is resolved: even looking at a path outside can mount a volume.
    if not (_is_inside(path, os.path.abspath(os.fsencode(folder))) or _is_inside(path, root)):
        raise ValueError("outside")
    path = os.path.realpath(path)
    if not _is_inside(path, root):
        raise ValueError("a link leads outside")
    descriptor = _open(root, os.path.relpath(path, root).split(b"/"))
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("not a regular file")
        part.expect(state.st_size)
        while part.is_wanted and (piece := os.read(descriptor, _CHUNK)):
            part.add(piece)
    finally:
        os.close(descriptor)


def _path(url: str) -> bytes:
    """The absolute path of a file: URL. Raises ValueError for one with several readings."""
    head = _HEAD.match(url)
    if head is None:
        raise ValueError("not a local file")
    segments = url[head.end() :].split("/")
    if not all(map(_SEGMENT.fullmatch, segments)):
        raise ValueError("not a path")
    names = [urllib.parse.unquote_to_bytes(segment) for segment in segments]
    if any(name in (b".", b"..") or b"/" in name or b"\0" in name for name in names):
        raise ValueError("a path with a way out")
    return b"/" + b"/".join(names)


def _is_inside(path: bytes, folder: bytes) -> bool:
    return path.startswith(folder.rstrip(b"/") + b"/")


def _open(root: bytes, names: list[bytes]) -> int:
    """Walk down a resolved path without following a link: it may have got one since."""
    folder = os.open(root, _FOLDER)
    try:
        for name in names[:-1]:
            inner = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(names[-1], _FILE, dir_fd=folder)
    finally:
        os.close(folder)
