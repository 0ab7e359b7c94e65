"""From an error to the OpenAI envelope: inside a handler, inside a stream, and at the outermost
edge for whatever nobody expected. Also gives every request its id and its line in the log."""

import logging
import re
import time
import uuid
from collections.abc import Callable

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.common import ErrorBody, ErrorDetail
from wire.errors import ClientError, EngineFailed, NotFound, ServiceError
from wire.logs import request_id

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # what a log says when the client left before an answer began
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PROBES = ("/live", "/ready", "/health", "/metrics")


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


def error_response(error: ServiceError) -> Response:
    """The answer for ``error``, with the headers its status asks for."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body may still come
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(envelope(error), error.status, headers, media_type="application/json")


async def on_service_error(_: Request, error: Exception) -> Response:
    """Handler for the errors of our own tree."""
    if not isinstance(error, ServiceError):
        raise error
    return error_response(error)


async def on_no_route(request: Request, _: Exception) -> Response:
    """Handler for 404."""
    return error_response(NotFound(f"There is no {request.method} route at this address."))


async def on_wrong_method(request: Request, error: Exception) -> Response:
    """Handler for 405."""
    response = error_response(MethodNotAllowed(f"{request.method} is not allowed at this address."))
    allowed = (getattr(error, "headers", None) or {}).get("Allow")
    if allowed:
        response.headers["Allow"] = allowed
    return response


def unexpected() -> ServiceError:
    """What a client is told of an exception nobody expected."""
    return EngineFailed("The server failed to answer this request.", code="internal_error")


class Boundary:
    """Outermost layer: request id in and out, one log line, and a 500 for what escapes.

    ``observe`` is called with the status of every finished HTTP request.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[int], None]) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(identity)
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error")
            if not status:
                await error_response(unexpected())(scope, receive, send_with_id)
        finally:
            status = status or CLIENT_CLOSED
            level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
            spent = (time.monotonic() - began) * 1000
            # repr: a path is the client's text and must not be able to forge a log line
            path = repr(scope["path"][:200])
            logger.log(level, "%s %s status=%d ms=%.0f", scope["method"], path, status, spent)
            self._observe(status)
            request_id.reset(token)
