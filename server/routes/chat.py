"""/v1/chat/completions."""

import asyncio
import functools
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.prepare import PreparedChat, Room, prepare
from server.chat.sse import EventStream, unless_gone
from server.chat.stream import chunks, events, fold
from server.errors import UnsupportedMediaType
from server.lifecycle import Service
from server.schemas.validate import parse_chat_request
from wire.errors import MediaRefused

router = APIRouter()

# Larger bodies are read and tokenised in a thread; for smaller ones it costs more than it saves.
THREAD_BYTES = 1 << 14

_T = TypeVar("_T")


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    began = time.monotonic()
    service: Service = request.app.state.service
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json.")
    body = await request.body()
    tenant: Tenant = request.state.tenant
    room = functools.partial(service.tile_room, request.scope["held"])
    return await unless_gone(request.receive, _answer(service, body, tenant, room, began))


async def _answer(
    service: Service, body: bytes, tenant: Tenant, room: Room, began: float
) -> Response:
    chat = await _prepare(service, body, tenant, room)
    source = chunks(chat, service.engine, service.backlog, service.metrics, began)
    if chat.stream:
        encoded = events(source, include_usage=chat.include_usage)
        return EventStream(encoded, service.settings.server.keep_alive_interval)
    answer = await fold(source)
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _prepare(service: Service, body: bytes, tenant: Tenant, room: Room) -> PreparedChat:
    run = asyncio.to_thread if len(body) > THREAD_BYTES else _here
    request = await run(parse_chat_request, body)
    service.backlog.check(tenant.id, request.n or 1)
    identity = f"chatcmpl-{uuid.uuid4().hex}"
    limits, metrics = service.settings.media, service.metrics
    try:
        chat = await prepare(
            request,
            identity,
            service.served(),
            service.media,
            limits,
            service.grammars,
            run,
            tenant,
            room,
        )
    except MediaRefused as refusal:
        metrics.media_refused.labels(refusal.code).inc()
        raise
    if chat.shown:
        metrics.media_time.observe(chat.media_seconds)
        metrics.observe_media([shown.facts for shown in chat.shown])
    return chat


async def _here(function: Callable[..., _T], /, *arguments: Any) -> _T:
    return function(*arguments)
