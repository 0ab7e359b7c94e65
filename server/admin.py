"""What operators may do, on a port of its own with keys of its own: nothing of it is on the public
one. Requests have no body; what they need to say stands in the query."""

import asyncio
import logging
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.auth import KeyAuth
from server.errors import Boundary, on_no_route, on_service_error, on_wrong_method
from server.keys import Keys
from server.lifecycle import Service
from server.limits import Account
from wire import profiling
from wire.errors import ClientError, InvalidRequest, ServiceError

LEVELS = ("debug", "info", "warning", "error")
PROFILED = ("api", "engine", "model")
LONGEST_PROFILE = 60.0


class ProfileRunning(ClientError):
    """There is one profiler in a process."""

    status = 409
    code = "profile_running"


class Admin:
    """The operators' application, ``app``."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self._service = service
        self._profiling = False
        self.app = Starlette(
            routes=[
                Route("/state", self.state),
                Route("/keys", self.keys),
                Route("/metrics", self.metrics),
                Route("/drain", self.drain, methods=["POST"]),
                Route("/resume", self.resume, methods=["POST"]),
                Route("/abort", self.abort, methods=["POST"]),
                Route("/cache/flush", self.flush, methods=["POST"]),
                Route("/log-level", self.log_level, methods=["POST"]),
                Route("/profile", self.profile, methods=["POST"]),
            ],
            middleware=[
                Middleware(Boundary, observe=lambda _: None),
                Middleware(KeyAuth, find=keys.find, open_paths=frozenset()),
            ],
            exception_handlers={
                ServiceError: on_service_error,
                404: on_no_route,
                405: on_wrong_method,
            },
        )

    async def state(self, _: Request) -> Response:
        """What the server does."""
        service = self._service
        ready = service.state == "ready"
        return JSONResponse(
            {
                "state": service.state,
                "reason": None if ready else service.reason,
                "requests_in_flight": service.gate.running,
                "profiling": self._profiling,
                "log_level": logging.getLevelName(logging.getLogger().level).lower(),
                "engine": msgspec.structs.asdict(service.engine.stats),
            }
        )

    async def keys(self, _: Request) -> Response:
        """Limits and use of each API key."""
        accounts = self._service.keys.accounts.values()
        return JSONResponse({"keys": [_describe(account) for account in accounts]})

    async def metrics(self, request: Request) -> Response:
        """As on the public port, and of each API key."""
        page, kind = self._service.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": kind})

    async def drain(self, request: Request) -> Response:
        """Take no new work."""
        self._service.pause()
        return await self.state(request)

    async def resume(self, request: Request) -> Response:
        """Take work again."""
        self._service.resume()
        return await self.state(request)

    async def abort(self, _: Request) -> Response:
        """End all requests."""
        return JSONResponse({"aborted": self._service.abort_all()})

    async def flush(self, request: Request) -> Response:
        """Forget what is cached."""
        self._service.flush()
        return await self.state(request)

    async def log_level(self, request: Request) -> Response:
        """Log more or less, here and in the engine."""
        level = request.query_params.get("level", "")
        if level not in LEVELS:
            raise InvalidRequest(f"level must be one of {', '.join(LEVELS)}.", param="level")
        logging.getLogger().setLevel(level.upper())
        for engine in self._service.engines:
            engine.set_log_level(level)
        return await self.state(request)

    async def profile(self, request: Request) -> Response:
        """Where the thread that serves requests, or the engine's, spends its time; or what the
        model computes, as a trace."""
        seconds = _seconds(request.query_params.get("seconds", "5"))
        of = request.query_params.get("of", "api")
        if of not in PROFILED:
            raise InvalidRequest(f"of must be one of {', '.join(PROFILED)}.", param="of")
        if self._profiling:
            raise ProfileRunning("A profile is being taken already.")
        self._profiling = True
        try:
            if of == "api":
                return Response(await _profile(seconds), media_type="text/plain")
            seen = await self._service.engine.profile(seconds, of)
        finally:
            self._profiling = False
        if of == "engine":
            return Response(seen, media_type="text/plain")
        name = {"Content-Disposition": 'attachment; filename="trace.json.gz"'}
        return Response(seen, headers=name, media_type="application/gzip")


async def _profile(seconds: float) -> str:
    """Of this thread."""
    text, profiler = "", profiling.begin()
    try:
        await asyncio.sleep(seconds)
    finally:
        text = profiling.end(profiler)
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_PROFILE:
        raise InvalidRequest(
            f"seconds must be a number above 0, at most {LONGEST_PROFILE:g}.", param="seconds"
        )
    return seconds


def _describe(account: Account) -> dict[str, Any]:
    return {
        "name": account.name,
        "limits": msgspec.structs.asdict(account.limits),
        "running": account.running,
        "used": msgspec.structs.asdict(account.usage),
        "left": account.headers(),
    }
