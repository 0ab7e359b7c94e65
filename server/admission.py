"""How much work is let in: a permit per running request, what its API key may use, a cap on the
bytes of a body, and how long a client may take to send its body and to read its answer. A permit is
held until the last byte of the answer is sent, streams included, and so is whatever a route enters
into the exit stack that it finds in its scope as "held"."""

import asyncio
import collections
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import Tenant
from server.errors import error_response
from server.limits import Account
from server.metrics import Metrics
from wire.errors import BodyTooLarge, BodyTooSlow, ServiceError, TooManyRequests
from wire.settings import ServerSettings

logger = logging.getLogger(__name__)

FILES = "/v1/files"
# Of the form that a file comes in, what is not the file.
FORM_BYTES = 64 << 10

# POSTs that end work: whoever may begin no more may still end what runs.
_ENDING = re.compile("/v1/responses/[^/]+/cancel")


class Gate:
    """Counts running requests. ``idle`` is set while there is none and nothing waits to be read.

    Under the fair policy a tenant gets a permit too while it has none, or less than an equal part
    of them, as server.backlog does with the queue.
    """

    def __init__(self, limit: int, metrics: Metrics, *, fair: bool) -> None:
        self._limit = limit
        self._metrics = metrics
        self._fair = fair
        self._running = self._unread = 0
        self._tenants = collections.Counter[bytes]()
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def running(self) -> int:
        """Requests that hold a permit."""
        return self._running

    @contextlib.contextmanager
    def permit(self, tenant: bytes) -> Iterator[None]:
        """Hold a permit. Raises TooManyRequests if there is none."""
        own = self._tenants[tenant]
        has_part = own == 0 or (own + 1) * len(self._tenants) <= self._limit
        if self._running >= self._limit and not (self._fair and has_part):
            self._metrics.refused.add(TooManyRequests.code)
            raise TooManyRequests(
                f"The server is answering {self._limit} requests already; try again later.",
                retry_after=1,
            )
        self._count(tenant, +1)
        try:
            yield
        finally:
            self._count(tenant, -1)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Not to be idle, without a permit: an answer is over, but not read."""
        self._unread += 1
        self._settle()
        try:
            yield
        finally:
            self._unread -= 1
            self._settle()

    def _count(self, tenant: bytes, change: int) -> None:
        self._running += change
        self._tenants[tenant] += change
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        self._settle()

    def _settle(self) -> None:
        if self._running or self._unread:
            self.idle.clear()
        else:
            self.idle.set()


class _Unread(Exception):
    """A client has stopped reading its answer."""


@contextlib.asynccontextmanager
async def _watched(send: Send, patience: float) -> AsyncIterator[Send]:
    """``send`` for the body of the block, which ends with _Unread when the client does not take
    what is sent for ``patience`` seconds. One timer for all that is sent: there may be an event
    for each token."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    began: float | None = None  # the oldest send that is under way

    async def watched(message: Message) -> None:
        nonlocal began
        if began is None:
            began = loop.time()
        try:
            await send(message)
        finally:
            began = None

    def look() -> None:
        nonlocal timer
        over = (loop.time() if began is None else began) + patience
        if over <= loop.time():
            limit.reschedule(over)
        else:
            timer = loop.call_at(over, look)

    limit = asyncio.timeout(None)
    timer = loop.call_later(patience, look)
    try:
        async with limit:
            yield watched
    except TimeoutError:
        if not limit.expired():
            raise
        raise _Unread from None
    finally:
        timer.cancel()


def _telling(send: Send, account: Account) -> Send:
    """``send`` that adds what is left of the key's limits to the head of an answer."""
    if not account.is_limited:
        return send

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(account.headers())
        await send(message)

    return telling


class Admission:
    """ASGI layer in front of the routes. Permits and keys' limits are for POSTs that begin work; a
    GET of what needs a key is one of the requests that the key may send in a minute. ``refusal``
    says why no work is taken at all now."""

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        refusal: Callable[[], ServiceError | None],
        settings: ServerSettings,
    ) -> None:
        self._app = app
        self._gate = gate
        self._refusal = refusal
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if scope["method"] == "POST" and not _ENDING.fullmatch(scope["path"]):
                await self._work(scope, receive, send)
            else:
                await self._other(scope, receive, send)
        except _Unread:
            logger.info("the client does not read its answer; its connection has ended")

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = scope["state"]["tenant"].account
        if scope["method"] in ("GET", "HEAD") and scope["path"] != "/metrics":
            send = _telling(send, account)
            try:
                account.count()
            except ServiceError as error:
                await error_response(error)(scope, receive, send)
                return
        async with _watched(send, self._settings.send_timeout) as watched:
            await self._app(scope, receive, watched)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant: Tenant = scope["state"]["tenant"]
        send = _telling(send, tenant.account)
        try:
            # The size first: it is wrong whatever state the server is in.
            most = self._most(scope)
            announced = Headers(scope=scope).get("content-length", "")
            if announced.isdecimal() and int(announced) > most:
                raise _too_large(most)
            refusal = self._refusal()
            if refusal is not None:
                raise refusal
            async with contextlib.AsyncExitStack() as held:
                held.enter_context(self._gate.permit(tenant.id))
                held.enter_context(tenant.account.request())
                scope["held"] = held
                async with _watched(send, self._settings.send_timeout) as watched:
                    await self._app(scope, self._limited(receive, most), watched)
        except ServiceError as error:
            await error_response(error)(scope, receive, send)

    def _most(self, scope: Scope) -> int:
        """Bytes of a body."""
        if scope["path"] == FILES:
            return self._settings.max_file_bytes + FORM_BYTES
        return self._settings.max_request_bytes

    def _limited(self, receive: Receive, most: int) -> Receive:
        """``receive`` that refuses a body which grows too large without having said so, and one
        that has not arrived in time."""
        size = 0
        deadline: float | None = asyncio.get_running_loop().time() + self._settings.body_timeout

        async def limited() -> Message:
            nonlocal size, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(
                    f"The request body must arrive within {self._settings.body_timeout:g} seconds."
                ) from None
            size += len(message.get("body", b""))
            if size > most:
                raise _too_large(most)
            if not message.get("more_body", False):
                deadline = None  # what comes now is the news that the client has left
            return message

        return limited


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body must not be larger than {most} bytes.")
