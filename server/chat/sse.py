"""Server-sent events over plain ASGI: comments while nothing happens, an error in the stream's own
form after the first byte and an ordinary error answer before it, and an end at once when the
client leaves."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import envelope, error_response, unexpected
from wire.errors import ServiceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


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


class EventStream(Response):
    """Sends each item of ``events`` as one event, then ``[DONE]``.

    The headers go out with the first event, or with the first comment after ``keep_alive``
    seconds of silence; an error before that is answered with its own status. ``events`` is
    closed in every case.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive: float) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["Content-Length"]
        self._events = events
        self._keep_alive = keep_alive
        self._last = time.monotonic()
        self._started = False
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        self._comments = asyncio.create_task(self._comment(send))
        try:
            await unless_gone(receive, self._run(scope, receive, send))
        except ClientGone:
            logger.info("the client left the stream")
        finally:
            await self._end_comments()
            await self._events.aclose()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for event in self._events:
                await self._write(send, b"data: " + event + b"\n\n")
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("unexpected error in a stream")
            failure = error if isinstance(error, ServiceError) else unexpected()
            await self._end_comments()
            if not self._started:
                await error_response(failure)(scope, receive, send)
                return
            await self._write(send, b"data: " + envelope(failure) + b"\n\n")
        await self._end_comments()
        await self._write(send, b"data: [DONE]\n\n", more=False)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if not self._started:
                self._started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            self._last = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _end_comments(self) -> None:
        self._comments.cancel()
        await asyncio.gather(self._comments, return_exceptions=True)

    async def _comment(self, send: Send) -> None:
        while True:
            silence = time.monotonic() - self._last
            if silence >= self._keep_alive:
                await self._write(send, b": keep-alive\n\n")
                silence = 0
            await asyncio.sleep(self._keep_alive - silence)
