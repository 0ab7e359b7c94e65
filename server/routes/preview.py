"""/v1/internvl/preview and /v1/chat/completions/render."""

import asyncio
from collections.abc import Callable

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.preview import Sketch, preview, sketch
from server.chat.render import render
from server.chat.sse import unless_gone
from server.lifecycle import Service
from server.routes.body import read_body, read_form, runner, told
from server.schemas.chat import ChatRequest
from server.schemas.preview import Preview, Render

router = APIRouter()


@router.post("/v1/internvl/preview")
async def preview_chat_completion(request: Request) -> Response:
    """What a chat request would cost; its body is that of a chat request."""
    service: Service = request.app.state.service
    body = await read_body(request)
    return await unless_gone(request.receive, _answer(service, body, request.state.tenant, preview))


@router.post("/v1/chat/completions/render")
async def render_chat_completion(request: Request) -> Response:
    """The prompt of a chat request, and where its pictures and videos are in it."""
    service: Service = request.app.state.service
    body = await read_body(request)
    return await unless_gone(request.receive, _answer(service, body, request.state.tenant, render))


async def _answer(
    service: Service, body: bytes, tenant: Tenant, tell: Callable[[Sketch], Preview | Render]
) -> Response:
    run = runner(body)
    asked, unknown = await read_form(service, body, ChatRequest, run)
    limits = service.settings.media
    with service.metrics.counting_refusals():
        async with service.preparing():
            drawn = await sketch(asked, service.served(), service.media, limits, run, tenant)
        found = await asyncio.to_thread(tell, drawn)
    return told(Response(msgspec.json.encode(found), media_type="application/json"), unknown)
