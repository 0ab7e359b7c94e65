"""From an error to the envelope of the API that was asked, OpenAI's or Anthropic's: inside a
handler, inside a stream, and at the outermost edge for whatever nobody expected. Also gives every
request its id and its line in the log."""

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.common import (
    AnthropicDetail,
    AnthropicDetails,
    AnthropicError,
    ErrorBody,
    ErrorDetail,
)
from server.schemas.validate import what_is_wrong
from wire import spans
from wire.errors import ClientError, EngineFailed, InvalidRequest, NotFound, ServiceError
from wire.logs import about, request_id, trace_id

logger = logging.getLogger(__name__)
access = logging.getLogger("server.access")

CLIENT_CLOSED = 499  # what a log says when the client left before an answer began
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PROBES = ("/live", "/started", "/ready", "/health", "/metrics")


class MethodNotAllowed(ClientError):
    """The route exists, for another method."""

    status = 405
    code = "method_not_allowed"


class UnsupportedMediaType(ClientError):
    """The body is not declared to be JSON."""

    status = 415
    code = "unsupported_media_type"


def envelope(error: ServiceError) -> bytes:
    """The JSON body for ``error``."""
    detail = ErrorDetail(error.message, error.type, error.param, error.code)
    return msgspec.json.encode(ErrorBody(detail))


# Anthropic's types of errors; any other status is that of a wrong request or of a failed server.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_envelope(error: ServiceError) -> bytes:
    """The JSON body for ``error`` as Anthropic's clients read it."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    details = AnthropicDetails(error.code, error.param)
    detail = AnthropicDetail(_ANTHROPIC_TYPES.get(error.status, usual), error.message, details)
    return msgspec.json.encode(AnthropicError(detail, request_id.get()))


def is_anthropic(scope: Scope) -> bool:
    """Whether a request is for a route of Anthropic's API, or from a client of it."""
    path: str = scope["path"]
    is_route = path == "/v1/messages" or path.startswith("/v1/messages/")
    return is_route or "anthropic-version" in Headers(scope=scope)


class ErrorResponse(Response):
    """Tells of ``error`` in the envelope of the API that was asked."""

    def __init__(self, error: ServiceError, headers: dict[str, str]) -> None:
        super().__init__(envelope(error), error.status, headers, media_type="application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        spans.fail(self._error)
        if is_anthropic(scope):
            self.body = anthropic_envelope(self._error)
            self.headers["Content-Length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_response(error: ServiceError) -> Response:
    """The answer for ``error``, with the headers its status asks for."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorResponse(error, headers)


async def on_service_error(_: Request, error: Exception) -> Response:
    """Handler for the errors of our own tree."""
    if not isinstance(error, ServiceError):
        raise error
    if error.__suppress_context__:
        # Nobody is told of it. Of the frames that it holds one holds the answer with this error: a
        # circle, which would keep the request's bytes until the garbage collector comes by.
        error.__context__ = None
    return error_response(error)


async def on_no_route(request: Request, _: Exception) -> Response:
    """Handler for 404."""
    return error_response(NotFound(f"There is no {request.method} route at this address."))


async def on_wrong_method(request: Request, _: Exception) -> Response:
    """Handler for 405."""
    response = error_response(MethodNotAllowed(f"{request.method} is not allowed at this address."))
    # The library names the methods of one route, and an address may have several.
    routes: Sequence[BaseRoute] = getattr(request.app.state, "routes", request.app.routes)
    allowed: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            allowed |= route.methods or set()
    if "GET" in allowed:
        allowed.add("HEAD")  # see server.head
    response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


async def on_wrong_parameter(_: Request, error: Exception) -> Response:
    """Handler for what FastAPI finds wrong with a path or a query."""
    if not isinstance(error, RequestValidationError):
        raise error
    details = error.errors()[0]
    name = str(details["loc"][-1])
    return error_response(InvalidRequest(f"{name} {what_is_wrong(details)}.", param=name))


async def on_http_error(_: Request, error: Exception) -> Response:
    """Handler for what a library refuses."""
    failure = InvalidRequest("The request cannot be answered as it is.", code="invalid_request")
    if not isinstance(error, HTTPException) or error.status_code >= 500:
        raise error
    failure.status = error.status_code
    return error_response(failure)


def unexpected() -> ServiceError:
    """What a client is told of an exception nobody expected."""
    return EngineFailed("The server failed to answer this request.", code="internal_error")


Trace = Callable[[Scope, str], AbstractContextManager[Callable[[int], None]]]
"""Keeps where the time goes for a request of this id, and its status."""


@contextlib.contextmanager
def untraced(_: Scope, __: str) -> Iterator[Callable[[int], None]]:
    """Keeps nothing."""
    yield lambda _: None


class Boundary:
    """Outermost layer: request id in and out, one log line, and a 500 for what escapes.

    ``observe`` is called with the status of every finished HTTP request, and ``trace`` traces it,
    but for probes. ``root_path`` is taken off the paths that begin with it.
    """

    def __init__(
        self,
        app: ASGIApp,
        observe: Callable[[int], None],
        root_path: str = "",
        trace: Trace = untraced,
    ) -> None:
        self._app = app
        self._observe = observe
        self._root = root_path
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root and scope["path"].startswith(self._root + "/"):
            scope["path"] = scope["path"].removeprefix(self._root)
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        trace = untraced if scope["path"] in _PROBES else self._trace
        with about(identity), trace(scope, identity) as answered:
            await self._answer(scope, receive, send, identity, answered)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        identity: str,
        answered: Callable[[int], None],
    ) -> None:
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                if is_anthropic(scope):
                    headers["Request-Id"] = identity
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error")
            if not status:
                await error_response(unexpected())(scope, receive, send_with_id)
        finally:
            status = status or CLIENT_CLOSED
            _log(scope, status, time.monotonic() - began)
            if scope["path"] not in _PROBES:  # that they ask means nothing, nor what they are told
                self._observe(status)
            answered(status)


def _log(scope: Scope, status: int, seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    # repr: a path is the client's text and must not be able to forge a log line
    path = repr(scope["path"][:200])
    tenant = scope.get("state", {}).get("tenant")
    key = f" key={tenant.account.name}" if tenant and tenant.account.name else ""
    trace = f" trace={trace_id.get()}" if trace_id.get() else ""
    line = "%s %s status=%d ms=%.0f%s%s"
    access.log(level, line, scope["method"], path, status, seconds * 1000, key, trace)
