"""Server-sent events: comments that keep a silent connection open, an error in the stream's own
form after the first byte and an ordinary error answer before it, and an end at once when the
client leaves."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import CLIENT_CLOSED, envelope, unexpected
from wire.errors import ServiceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Streams end by themselves when the server drains (server.lifecycle), not on the first signal.
AppStatus.enable_automatic_graceful_drain = False


class ClientGone(Exception):
    """Nobody is there to read the answer."""


async def on_client_gone(_: Request, __: Exception) -> Response:
    """Handler for clients that left before an answer began: a status for the log."""
    return Response(status_code=CLIENT_CLOSED)


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

    Nothing is asked of ``events`` before the answer is called for, and from then on it is closed
    in every case: a stream that nobody ever sends has not begun to work.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive: float) -> None:
        super().__init__(
            events,
            headers={"Cache-Control": "no-cache"},
            ping=keep_alive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry. Waits for the first event, so that an error before it is raised and
        answered with its own status; but for one keep-alive interval only, then the stream
        begins with a comment."""
        async with contextlib.aclosing(self._events):
            first = asyncio.ensure_future(anext(self._events))
            try:
                await unless_gone(receive, asyncio.wait({first}, timeout=self.ping_interval))
                if first.done():
                    first.result()
                self.body_iterator = _framed(first, self._events)
                await super().__call__(scope, receive, send)
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)


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
