"""/v1/internvl/preview."""

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.preview import preview
from server.chat.sse import unless_gone
from server.lifecycle import Service
from server.routes.body import read_body, read_form, runner, told
from server.schemas.chat import ChatRequest

router = APIRouter()


@router.post("/v1/internvl/preview")
async def preview_chat_completion(request: Request) -> Response:
    """What a chat request would cost; its body is that of a chat request."""
    service: Service = request.app.state.service
    body = await read_body(request)
    return await unless_gone(request.receive, _answer(service, body, request.state.tenant))


async def _answer(service: Service, body: bytes, tenant: Tenant) -> Response:
    run = runner(body)
    asked, unknown = await read_form(service, body, ChatRequest, run)
    limits = service.settings.media
    with service.metrics.counting_refusals():
        async with service.preparing():
            found = await preview(asked, service.served(), service.media, limits, run, tenant)
    return told(Response(msgspec.json.encode(found), media_type="application/json"), unknown)
