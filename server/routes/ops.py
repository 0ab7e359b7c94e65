"""Probes and metrics: what orchestrators ask."""

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from server.lifecycle import Service
from server.schemas.common import Health, LoadProgress

router = APIRouter()


@router.get("/live")
async def live() -> Response:
    """200 while the process answers at all; a restart helps when it does not."""
    return _told(Health("live"))


@router.get("/started")
async def started(request: Request) -> Response:
    """200 once the model has been loaded, also while it drains or its engine is replaced; until
    then 503 with the reason."""
    service: Service = request.app.state.service
    return _told(Health("started")) if service.started else _not_ready(service)


@router.get("/ready")
@router.get("/health")
async def ready(request: Request) -> Response:
    """200 when requests are answered, else 503 with the reason."""
    service: Service = request.app.state.service
    return _told(Health("ready")) if service.state == "ready" else _not_ready(service)


def _not_ready(service: Service) -> Response:
    state = service.state
    health = Health(state, service.reason)
    progress = service.progress
    if state == "starting" and progress is not None:
        health.progress = LoadProgress(progress.stage, progress.done, progress.total)
    answer = _told(health)
    answer.status_code, answer.headers["Retry-After"] = 503, "5"
    return answer


def _told(health: Health) -> Response:
    return Response(msgspec.json.encode(health), media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Everything measured, for Prometheus."""
    service: Service = request.app.state.service
    # Whoever has a key comes here. What others use is for operators, if they have their own port.
    keys = not service.settings.server.admin_port
    page, kind = service.metrics.page(request.headers.get("accept", ""), keys=keys)
    return Response(page, headers={"Content-Type": kind})
