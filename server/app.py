"""The ASGI application: routes, layers, and the service behind them. Knows nothing of uvicorn or
signals; tests run it as it is."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engine.client import EngineClient
from server.admission import Admission
from server.auth import PROBES, KeyAuth
from server.chat.showing import Media
from server.chat.sse import ClientGone, on_client_gone
from server.cors import Cors
from server.errors import (
    Boundary,
    on_http_error,
    on_no_route,
    on_service_error,
    on_wrong_method,
    on_wrong_parameter,
    untraced,
)
from server.head import Head
from server.lifecycle import Service
from server.limits import Clock
from server.openapi import describe
from server.routes import MODULES, web
from server.version import installed_version
from wire.errors import ServiceError
from wire.settings import Settings

# Of FastAPI's own: it would tell of addresses and exceptions as they are, whatever server.tracing
# does, where variables or a library in this process ask for it.
OFF: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)


def create_app(
    settings: Settings,
    engine: EngineClient,
    media: Media,
    clock: Clock = time.monotonic,
    critic: EngineClient | None = None,
) -> FastAPI:
    """The application, with its ``Service`` as ``app.state.service``. The lifespan starts and
    ends ``engine``, that of a ``critic``, and ``media``; it does not wait for the model. ``clock``
    is that of the keys' limits. Raises SettingError."""
    service = Service(settings, engine, media, clock, critic)
    tracing = None
    if settings.tracing.otlp_traces_endpoint:
        # Imported late: it takes a while, and few want it.
        from server.tracing import Tracing

        tracing = Tracing(settings.tracing, installed_version())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            if tracing is not None:
                await tracing.close()

    app = FastAPI(
        title="InternVL Server",
        version=installed_version(),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry=OFF,
        # As a client sees it. FastAPI's own root_path would be taken off the path once more.
        servers=[{"url": root_path}] if (root_path := settings.server.root_path) else None,
        exception_handlers={
            ServiceError: on_service_error,
            ClientGone: on_client_gone,
            ClientDisconnect: on_client_gone,
            RequestValidationError: on_wrong_parameter,
            HTTPException: on_http_error,
            404: on_no_route,
            405: on_wrong_method,
        },
    )
    app.state.service, app.state.tracing = service, tracing
    has_page = settings.server.chat_page
    modules = [module for module in MODULES if has_page or module is not web]
    app.state.routes = [route for module in modules for route in module.router.routes]
    for routes in modules:
        app.include_router(routes.router)
    # The last one added is the outermost.
    app.add_middleware(Head)
    app.add_middleware(
        Admission,
        gate=service.gate,
        refusal=service.refusal,
        settings=settings.server,
    )
    app.add_middleware(
        KeyAuth,
        find=service.keys.find if service.keys.needed else None,
        open_paths=PROBES
        | ({"/metrics"} if settings.server.open_metrics else set())
        | ({"/"} if has_page else set()),
        open_folder=web.UNDER if has_page else None,
    )
    if settings.server.cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=settings.server.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    app.add_middleware(
        Boundary,
        observe=lambda status: service.metrics.requests.add(str(status)),
        root_path=settings.server.root_path,
        trace=untraced if tracing is None else tracing.request,
    )
    describe(app)
    return app
