"""How much work is let in: a permit per running request, and a cap on the bytes of a body. A
permit is held until the last byte of the answer is sent, streams included."""

import asyncio
from collections.abc import Callable

from prometheus_client import Gauge
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response
from wire.errors import BodyTooLarge, ServiceError, TooManyRequests


class Gate:
    """Counts running requests. ``idle`` is set while there is none."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self._limit = limit
        self._gauge = gauge
        self._running = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> None:
        if self._running >= self._limit:
            raise TooManyRequests(
                f"The server is answering {self._limit} requests already; try again later.",
                retry_after=1,
            )
        self._count(+1)

    def __exit__(self, *_: object) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        self._running += change
        self._gauge.set(self._running)
        if self._running:
            self.idle.clear()
        else:
            self.idle.set()


class Admission:
    """ASGI layer in front of every POST. ``refusal`` says why no work is taken at all now."""

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        refusal: Callable[[], ServiceError | None],
        max_body: int,
    ) -> None:
        self._app = app
        self._gate = gate
        self._refusal = refusal
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            # The size first: it is wrong whatever state the server is in.
            announced = Headers(scope=scope).get("content-length", "")
            if announced.isdecimal() and int(announced) > self._max_body:
                raise self._too_large()
            refusal = self._refusal()
            if refusal is not None:
                raise refusal
            with self._gate:
                await self._app(scope, self._counting(receive), send)
        except ServiceError as error:
            await error_response(error)(scope, receive, send)

    def _counting(self, receive: Receive) -> Receive:
        """``receive`` that refuses a body which grows too large without having said so."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"The request body must not be larger than {self._max_body} bytes.")
