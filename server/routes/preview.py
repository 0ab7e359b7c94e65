"""/v1/internvl/preview."""

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.preview import preview
from server.chat.sse import unless_gone
from server.lifecycle import Service
from server.routes.body import read_body, runner
from server.schemas.validate import parse_chat_request

router = APIRouter()


@router.post("/v1/internvl/preview")
async def preview_chat_completion(request: Request) -> Response:
    """What a chat request would cost; its body is that of a chat request."""
    service: Service = request.app.state.service
    body = await read_body(request)
    run = runner(body)
    asked = await run(parse_chat_request, body)
    tenant: Tenant = request.state.tenant
    limits = service.settings.media
    work = preview(asked, service.served(), service.media, limits, run, tenant)
    with service.metrics.counting_refusals():
        found = await unless_gone(request.receive, work)
    return Response(msgspec.json.encode(found), media_type="application/json")
