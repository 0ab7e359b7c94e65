"""/v1/messages, Anthropic's API."""

import contextlib
import functools
import time
import uuid
from collections.abc import AsyncGenerator

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.showing import Room
from server.chat.sse import EventStream, unless_gone
from server.chat.stream import chunks
from server.dialects.anthropic import (
    as_chat,
    framed,
    last_words,
    message_events,
    message_of,
)
from server.dialects.draft import Origins
from server.lifecycle import Service
from server.routes.body import (
    count_prompt,
    prepare_chat,
    read_body,
    read_form,
    runner,
    told,
)
from server.schemas.message import Event, TokenCount
from server.schemas.messages import CountRequest, MessagesRequest

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    began = time.monotonic()
    service: Service = request.app.state.service
    body = await read_body(request)
    tenant: Tenant = request.state.tenant
    room = functools.partial(service.tile_room, request.scope["held"])
    return await unless_gone(request.receive, _answer(service, body, tenant, room, began))


async def _answer(
    service: Service, body: bytes, tenant: Tenant, room: Room, began: float
) -> Response:
    async with service.preparing():
        run = runner(body)
        request, unknown = await read_form(service, body, MessagesRequest, run)
        asked, origins = await run(as_chat, request)
        with origins.named():
            identity = f"msg_{uuid.uuid4().hex}"
            chat = await prepare_chat(service, asked, identity, run, tenant, room)
    source = chunks(chat, service.engine, service.backlog, service.metrics, began)
    events = message_events(chat, source)
    if chat.stream:
        interval = service.settings.server.keep_alive_interval
        return told(EventStream(_framed(events, origins), interval, last_words), unknown)
    with origins.named():
        answer = await message_of(events)
    return told(Response(msgspec.json.encode(answer), media_type="application/json"), unknown)


async def _framed(
    events: AsyncGenerator[Event, None], origins: Origins
) -> AsyncGenerator[bytes, None]:
    with origins.named():
        async with contextlib.aclosing(events):
            async for event in events:
                yield framed(event)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """The tokens that a message would have as its input, without generating any."""
    service: Service = request.app.state.service
    body = await read_body(request)
    return await unless_gone(request.receive, _count(service, body, request.state.tenant))


async def _count(service: Service, body: bytes, tenant: Tenant) -> Response:
    run = runner(body)
    request, unknown = await read_form(service, body, CountRequest, run)
    asked, origins = await run(as_chat, request)
    with origins.named():
        count = TokenCount(await count_prompt(service, asked, run, tenant))
    return told(Response(msgspec.json.encode(count), media_type="application/json"), unknown)
