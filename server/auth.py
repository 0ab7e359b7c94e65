"""Bearer keys. Everything needs one, except probes, metrics and the version; without configured
keys the server is open. Comparison takes the same time for every wrong key."""

import dataclasses
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from wire.errors import Unauthorized
from wire.settings import ServerSettings

OPEN_PATHS = frozenset({"/live", "/ready", "/health", "/version", "/metrics"})


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Whose a request is: the owner of an API key, or whoever asks a server without keys.

    ``id`` is the key's fingerprint, ``weight`` its part of the engine under the fair policy.
    What is cached for one tenant is found only by those with the same ``salt``.
    """

    id: bytes = b""
    weight: float = 1.0
    salt: bytes = b""


class BearerAuth:
    """ASGI layer that lets only requests with a known key through, with their ``Tenant`` as
    ``request.state.tenant``."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        weights = settings.api_key_weights or (1.0,) * len(settings.api_key)
        self._tenants = []
        for key, weight in zip(settings.api_key, weights, strict=True):
            identity = _fingerprint(key)
            salt = identity if settings.cache_per_key else b""
            self._tenants.append(Tenant(identity, weight, salt))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or not self._tenants or scope["path"] in OPEN_PATHS:
            scope.setdefault("state", {})["tenant"] = Tenant()
            await self._app(scope, receive, send)
            return
        key = _sent_key(Headers(scope=scope))
        given = _fingerprint(key)
        matches = [hmac.compare_digest(given, tenant.id) for tenant in self._tenants]
        if key and any(matches):
            scope.setdefault("state", {})["tenant"] = self._tenants[matches.index(True)]
            await self._app(scope, receive, send)
            return
        what = "The API key is wrong." if key else "An API key is needed."
        error = Unauthorized(f"{what} Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        await error_response(error)(scope, receive, send)


def _sent_key(headers: Headers) -> str:
    """As OpenAI's clients send it, or as Anthropic's do; empty if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    bearer = key.strip() if scheme.lower() == "bearer" else ""
    return bearer or headers.get("x-api-key", "").strip()


def _fingerprint(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
