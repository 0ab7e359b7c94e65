"""Server-sent events: comments that keep a silent connection open, an error in the stream's own
form after the first byte and an ordinary error answer before it, and an end at once when the
client leaves."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Receive, Scope, Send

from server.errors import envelope, unexpected
from wire.errors import ServiceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Streams end by themselves when the server drains (server.lifecycle), not on the first signal.
AppStatus.enable_automatic_graceful_drain = False


class ClientGone(Exception):
    """Nobody is there to read the answer."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await ``work``; cancel it and raise ClientGone when the client disconnects first.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """Sends each item of ``events`` as one event, then ``[DONE]``; an error becomes an event.

    Make it with ``open``. ``events`` is closed in every case.
    """

    def __init__(
        self, first: "asyncio.Future[bytes]", events: AsyncGenerator[bytes, None], keep_alive: float
    ) -> None:
        super().__init__(
            _framed(first, events),
            headers={"Cache-Control": "no-cache"},
            ping=keep_alive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        self._first = first
        self._events = events

    @classmethod
    async def open(cls, events: AsyncGenerator[bytes, None], keep_alive: float) -> "EventStream":
        """Wait for the first event, so that an error before it is answered with its own status;
        but for ``keep_alive`` seconds only, then the stream begins with a comment."""
        first = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait({first}, timeout=keep_alive)
            if first.done():
                first.result()
        except BaseException:
            await _close(first, events)
            raise
        return cls(first, events, keep_alive)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self._first, self._events)


async def _framed(
    first: "asyncio.Future[bytes]", events: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    try:
        yield b"data: " + await first + b"\n\n"
        async for event in events:
            yield b"data: " + event + b"\n\n"
    except Exception as error:
        if not isinstance(error, ServiceError):
            logger.exception("unexpected error in a stream")
        failure = error if isinstance(error, ServiceError) else unexpected()
        yield b"data: " + envelope(failure) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _close(first: "asyncio.Future[bytes]", events: AsyncGenerator[bytes, None]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await events.aclose()
