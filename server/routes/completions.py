"""/v1/completions."""

import contextlib
import time
import uuid

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.sse import unless_gone
from server.chat.stream import chunks, events
from server.completions.answer import fold_text, text_chunks
from server.completions.prepare import prepare_texts
from server.lifecycle import Service
from server.limits import Spending
from server.routes.body import read_body, read_form, runner, told
from server.routes.streams import answer_stream
from server.schemas.completion import CompletionRequest
from wire.logs import request_id

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Go on with one or more texts, whole or as a stream of server-sent events."""
    began = time.monotonic()
    service: Service = request.app.state.service
    body = await read_body(request)
    tenant: Tenant = request.state.tenant
    held: contextlib.AsyncExitStack = request.scope["held"]
    return await unless_gone(request.receive, _answer(service, body, tenant, held, began))


async def _answer(
    service: Service, body: bytes, tenant: Tenant, held: contextlib.AsyncExitStack, began: float
) -> Response:
    run = runner(body)
    identity = f"cmpl-{uuid.uuid4().hex}"
    async with service.preparing():
        request, unknown = await read_form(service, body, CompletionRequest, run)
        service.backlog.check(tenant.id, len(request.prompt) * (request.n or 1))
        handle = service.handles.open(tenant.id, identity, request_id.get())
        model, grammars = service.served(), service.grammars
        async with handle.preparing():
            chats = await prepare_texts(request, identity, model, grammars, run, tenant, handle)
    Spending.of_all([chat.spending for chat in chats]).check()
    source = text_chunks(
        request,
        identity,
        chats,
        lambda chat: chunks(chat, service.engine, service.backlog, service.metrics, began),
    )
    if chats[0].stream:
        encoded = events(source, include_usage=chats[0].include_usage)
        stream = answer_stream(service, chats[0], identity, tenant, encoded, held)
        return told(stream, unknown)
    answer = msgspec.json.encode(await fold_text(source))
    return told(Response(answer, media_type="application/json"), unknown)
