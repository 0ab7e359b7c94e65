"""One part while its bytes arrive: what they may cost, and how they are refused.

The fetcher adds bytes as it gets them, from wherever; the first one over a limit ends the fetch.
Refusals name the part and are the same sentences for every source.
"""

import io
import logging

from preprocessing.allowance import Allowance
from preprocessing.budget import Share
from preprocessing.media import NOUNS, Kind, too_many
from wire.errors import Code, MediaRefused

log = logging.getLogger(__name__)


class Incoming:
    """The bytes of one part, at most ``most``; ``param`` is the field that an error names. They
    take from ``room`` what they need of the server's memory, where that is not settled before."""

    def __init__(
        self, kind: Kind, param: str, most: int, allowance: Allowance, room: Share | None = None
    ) -> None:
        self.kind = kind
        self.is_wanted = True  # False tells a thread that nobody waits any more
        self._param = param
        self._most = most
        self._allowance = allowance
        self._room = room
        self._size = 0
        self._unkept = 0
        self._body = io.BytesIO()

    def expect(self, size: int) -> None:
        """Refuse a size that was announced, before a byte of it is there."""
        if size > self._most:
            raise self._too_large()
        if not self._allowance.has(size):
            raise self._too_large_together()

    def add(self, piece: bytes) -> None:
        """Take what comes next. Raises MediaRefused over a limit, Unavailable without room."""
        self._size += len(piece)
        self._count(self._size, len(piece))
        # At once or not at all: downloads that wait for each other's room would all wait.
        if self._room is not None and not self._room.grow(len(piece)):
            raise too_many(self._param)
        self._body.write(piece)

    def count(self, size: int) -> None:
        """Count bytes that are not kept here: compressed ones, which may be far more than what they
        unpack to, or those of a file that is kept elsewhere."""
        self._unkept += size
        self._count(self._unkept, size)

    def value(self) -> bytes:
        """Everything that was added; without a copy, as a BytesIO lends its own buffer."""
        return self._body.getvalue()

    def refused(self, message: str, code: Code = "invalid_media") -> MediaRefused:
        """The error for a message in which ``{What}`` stands for what the part is."""
        return MediaRefused(message.format(What=NOUNS[self.kind]), param=self._param, code=code)

    def unreachable(self, reason: str) -> MediaRefused:
        """The one error for everything that goes wrong once an address is dialled."""
        log.info("%s could not be fetched: %s (%s)", NOUNS[self.kind], reason, self._param)
        return self.refused("{What} could not be fetched.", "media_unreachable")

    def _count(self, so_far: int, size: int) -> None:
        if so_far > self._most:
            raise self._too_large()
        if not self._allowance.take(size):
            raise self._too_large_together()

    def _too_large(self) -> MediaRefused:
        message = f"{{What}} has more than {self._most} encoded bytes."
        return self.refused(message, "media_too_large")

    def _too_large_together(self) -> MediaRefused:
        message = f"The request's media have more than {self._allowance.most} encoded bytes."
        return self.refused(message, "media_too_large")
