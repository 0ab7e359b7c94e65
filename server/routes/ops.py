"""Probes and metrics: what orchestrators ask."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.lifecycle import Service
from server.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/live")
async def live() -> dict[str, str]:
    """200 while the process answers at all; a restart helps when it does not."""
    return {"status": "live"}


@router.get("/ready")
@router.get("/health")
async def ready(request: Request) -> Response:
    """200 when requests are answered, else 503 with the reason."""
    service: Service = request.app.state.service
    state = service.state
    if state == "ready":
        return JSONResponse({"status": state})
    body: dict[str, Any] = {"status": state, "reason": service.reason}
    progress = service.engine.progress
    if state == "starting" and progress is not None:
        body["progress"] = {
            "stage": progress.stage,
            "done": progress.done,
            "total": progress.total,
        }
    return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Everything measured, for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})
