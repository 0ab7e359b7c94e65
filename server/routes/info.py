"""/server_info, /version and /docs: what this server is and how it is asked."""

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from server.info import server_info
from server.lifecycle import Service
from server.reference import HEADERS, reference
from server.schemas.common import Version
from server.version import installed_version

router = APIRouter()


@router.get("/server_info")
async def tell_server_info(request: Request) -> Response:
    """Versions, the model, what computes it, and the settings that are no secret."""
    service: Service = request.app.state.service
    info = server_info(service)
    return Response(msgspec.json.encode(info), media_type="application/json")


@router.get("/version")
async def version() -> Response:
    """The version of this server."""
    told = Version(installed_version())
    return Response(msgspec.json.encode(told), media_type="application/json")


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> Response:
    """All routes, to be read by people."""
    page = reference(request.app.openapi())
    return Response(page, headers=HEADERS, media_type="text/html")
