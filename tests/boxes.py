"""Take an MP4 apart into its boxes, change one, and put it together again."""

import struct
from collections.abc import Callable

_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"dinf", b"stbl", b"edts"}


def box(kind: bytes, body: bytes) -> bytes:
    """One box with its length."""
    return struct.pack(">I", 8 + len(body)) + kind + body


def rebuild(encoded: bytes, change: dict[bytes, Callable[[bytes], bytes]]) -> bytes:
    """The file with the body of every box in ``change`` replaced, at any depth.

    Positions in the file are not corrected: the index has to stand behind the frames.
    """
    found, at = b"", 0
    while at + 8 <= len(encoded):
        size, kind = struct.unpack_from(">I4s", encoded, at)
        body = encoded[at + 8 : at + size]
        if kind in change:
            body = change[kind](body)
        elif kind in _PARENTS:
            body = rebuild(body, change)
        found += box(kind, body)
        at += size
    return found
