"""Server-sent events: comments that keep a silent connection open, an error in the stream's own
form after the first byte and an ordinary error answer before it, and an end at once when the
client leaves."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import CLIENT_CLOSED, envelope, unexpected
from wire import spans
from wire.errors import ServiceError

logger = logging.getLogger(__name__)

T = TypeVar("T")

OnError = Callable[[ServiceError, int], bytes]
"""How a stream of some form ends with an error, at the event of this number."""

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
# They end no line of a stream, but for clients that split it with ``str.splitlines``, as httpx's
# ``iter_lines`` does. JSON can say them in other words.
_LINE_ENDS = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)


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


def last_words(error: ServiceError, _: int) -> bytes:
    """How a stream of OpenAI's form ends with an error."""
    return b"data: " + envelope(error) + b"\n\n" + DONE


class EventStream(StreamingResponse):
    """Sends ``events``, each framed already; ``keep_alive`` seconds of silence become a comment,
    and an error behind the first byte what ``on_error`` makes of it.

    Nothing is asked of ``events`` before the answer is called for, and from then on it is closed
    in every case: a stream that nobody ever sends has not begun to work.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keep_alive: float,
        on_error: OnError = last_words,
    ) -> None:
        # A proxy that kept the answer until it has more of it would defeat the stream.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._keep_alive = keep_alive
        self._on_error = on_error
        self._due = 0.0  # when a comment is, on the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry. Waits for the first event, so that an error before it is raised and
        answered with its own status; but for one keep-alive interval only, then the stream
        begins with a comment."""
        self._due = asyncio.get_running_loop().time() + self._keep_alive
        async with contextlib.aclosing(self._events):
            first = asyncio.ensure_future(anext(self._events))
            try:
                await unless_gone(receive, asyncio.wait({first}, timeout=self._keep_alive))
                if first.done():
                    first.result()
                with contextlib.suppress(ClientGone):
                    await unless_gone(receive, self._send_all(first, send))
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

    async def _send_all(self, first: "asyncio.Future[bytes]", send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        clock = asyncio.get_running_loop().time
        comments = asyncio.create_task(self._comment(send))
        begun = ended = False
        try:
            while not ended:
                try:
                    event = await (anext(self._events) if begun else first)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    failure = known(error)
                    spans.fail(failure)
                    event = self._on_error(failure, 0)
                    ended = True
                begun = True
                self._due = clock() + self._keep_alive
                event = _inert(event)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            comments.cancel()
            await asyncio.gather(comments, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            wait = self._due - clock()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            self._due = clock() + self._keep_alive
            await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})


def _inert(event: bytes) -> bytes:
    """The same JSON, without what somebody may take for the end of a line."""
    if not event.isascii():
        for raw, escaped in _LINE_ENDS:
            if raw in event:
                event = event.replace(raw, escaped)
    return event


def known(error: Exception) -> ServiceError:
    """What a client is told of an error in a stream; the log is told of one nobody expected."""
    if isinstance(error, ServiceError):
        return error
    logger.error("unexpected error in a stream", exc_info=error)
    return unexpected()
