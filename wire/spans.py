"""Where the time of a request goes, told by whoever spends it. Nothing is kept, and nothing
imported, unless something that keeps it stands in ``current``: server.tracing puts it there.

What is told are names of ours, numbers and settings; never what a client sent.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol

from wire.errors import ServiceError

Values = Mapping[str, str | bool | int | float | list[str] | None]


class Span(Protocol):
    """A piece of work with a beginning and an end."""

    def child(self, name: str, start: float | None = None) -> "Span":
        """A piece of it, which begins now or at ``start``, of ``time.time``."""

    def set(self, values: Values) -> None:
        """Tell of it; what is None is not told."""

    def link(self, other: "Span") -> None:
        """It has to do with a piece of another request."""

    def fail(self, error: BaseException) -> None:
        """It has ended so. Of an error nothing but its ``kind_of`` is told."""

    def end(self, end: float | None = None) -> None:
        """It ends now, or ended at ``end``, of ``time.time``."""


ABORTED = "aborted"

current: ContextVar[Span | None] = ContextVar("span", default=None)


class _Nothing:
    """Keeps nothing."""

    def child(self, name: str, start: float | None = None) -> Span:
        return self

    def set(self, values: Values) -> None:
        pass

    def link(self, other: Span) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass

    def end(self, end: float | None = None) -> None:
        pass


NOTHING: Span = _Nothing()


def kind_of(error: BaseException) -> str:
    """What an error is called."""
    if isinstance(error, ServiceError):
        return error.code
    return type(error).__name__ if isinstance(error, Exception) else ABORTED


def is_ours(error: BaseException) -> bool:
    """Whether it is the server's: not that of a wrong request, or of a client that has left."""
    return error.status >= 500 if isinstance(error, ServiceError) else isinstance(error, Exception)


def fail(error: Exception) -> None:
    """What is under way is answered with ``error``."""
    if (one := current.get()) is not None:
        one.fail(error)


@contextlib.contextmanager
def span(name: str, values: Values | None = None) -> Iterator[Span]:
    """The block is a piece of what is under way, if that is kept. Not for generators: who reads
    them would get their context."""
    parent = current.get()
    if parent is None:
        yield NOTHING
        return
    one = parent.child(name)
    one.set(values or {})
    token = current.set(one)
    try:
        yield one
    except BaseException as error:
        one.fail(error)
        raise
    finally:
        current.reset(token)
        one.end()
