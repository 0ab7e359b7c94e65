"""/v1/chat/completions."""

import contextlib
import functools
import time
import uuid

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.sse import unless_gone
from server.chat.stream import chunks, events, fold
from server.lifecycle import Service
from server.routes.body import prepare_chat, read_body, read_form, runner, told
from server.routes.streams import answer_stream
from server.schemas.chat import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    began = time.monotonic()
    service: Service = request.app.state.service
    body = await read_body(request)
    tenant: Tenant = request.state.tenant
    held: contextlib.AsyncExitStack = request.scope["held"]
    return await unless_gone(request.receive, _answer(service, body, tenant, held, began))


async def _answer(
    service: Service, body: bytes, tenant: Tenant, held: contextlib.AsyncExitStack, began: float
) -> Response:
    room = functools.partial(service.tile_room, held)
    async with service.preparing():
        run = runner(body)
        request, unknown = await read_form(service, body, ChatRequest, run)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        chat = await prepare_chat(service, request, identity, run, tenant, room)
    source = chunks(chat, service.engine, service.backlog, service.metrics, began)
    if chat.stream:
        encoded = events(source, include_usage=chat.include_usage)
        stream = answer_stream(service, chat, identity, tenant, encoded, held)
        return told(stream, unknown)
    answer = await fold(source)
    whole = Response(msgspec.json.encode(answer), media_type="application/json")
    return told(whole, unknown)
