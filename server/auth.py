"""Bearer keys. Everything needs one, except probes, metrics and the version; without configured
keys the server is open. Comparison takes the same time for every wrong key."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from wire.errors import Unauthorized

OPEN_PATHS = frozenset({"/live", "/ready", "/health", "/version", "/metrics"})


class BearerAuth:
    """ASGI layer that lets only requests with a known key through."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [_fingerprint(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _fingerprint(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() == "bearer" and any(matches):
            await self._app(scope, receive, send)
            return
        what = "The API key is wrong." if key else "An API key is needed."
        error = Unauthorized(f"{what} Send it as 'Authorization: Bearer KEY'.")
        await error_response(error)(scope, receive, send)


def _fingerprint(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
