"""API keys at the door. Everything needs one, except probes; without configured keys the server is
open. Which keys there are is known to server.keys."""

import dataclasses
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import error_response
from server.limits import Account
from wire.errors import Unauthorized

PROBES = frozenset({"/live", "/started", "/ready", "/health"})


@dataclasses.dataclass(frozen=True)
class Tenant:
    """Whose a request is: the owner of an API key, or whoever asks a server without keys.

    ``id`` tells tenants apart, ``weight`` is its part of the engine under the fair policy, and
    ``priority`` the best that it may ask for under the priority policy (None: any).
    What is cached for one tenant is found only by those with the same ``salt``.
    """

    id: bytes = b""
    weight: float = 1.0
    salt: bytes = b""
    priority: int | None = None
    account: Account = dataclasses.field(default_factory=Account)


ANYBODY = Tenant()


class KeyAuth:
    """ASGI layer that lets only requests with a known key through, with their ``Tenant`` as
    ``request.state.tenant``. ``find`` says whose a key is; None: no key is needed. To the paths of
    ``open_paths``, and those that begin with ``open_folder``, none is."""

    def __init__(
        self,
        app: ASGIApp,
        find: Callable[[str], Tenant | None] | None,
        open_paths: frozenset[str] = PROBES,
        open_folder: str | None = None,
    ) -> None:
        self._app = app
        self._find = find
        self._open_paths = open_paths
        self._open_folder = open_folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        tenant: Tenant | None = ANYBODY
        key = ""
        if scope["type"] == "http" and self._find and not self._is_open(scope["path"]):
            key = _given(Headers(scope=scope))
            tenant = self._find(key) if key else None
        if tenant is not None:
            scope.setdefault("state", {})["tenant"] = tenant
            await self._app(scope, receive, send)
            return
        what = "The API key is wrong." if key else "An API key is needed."
        error = Unauthorized(f"{what} Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        await error_response(error)(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        in_folder = self._open_folder is not None and path.startswith(self._open_folder)
        return in_folder or path in self._open_paths


def _given(headers: Headers) -> str:
    """The key of a request: a bearer token, or ``x-api-key`` as Anthropic's clients send it."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer or headers.get("x-api-key", "").strip()
