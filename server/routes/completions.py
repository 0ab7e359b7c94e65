"""/v1/completions."""

import uuid

from fastapi import APIRouter, Request, Response

from server.chat.stream import chunks, events
from server.completions.answer import fold_text, text_chunks
from server.completions.prepare import prepare_texts
from server.limits import Spending
from server.routes.body import Arrival, attend, read_form, told, whole
from server.routes.streams import answer_stream
from server.schemas.completion import CompletionRequest
from wire.logs import request_id

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Go on with one or more texts, whole or as a stream of server-sent events."""
    return await attend(request, _answer)


async def _answer(arrival: Arrival) -> Response:
    service, tenant = arrival.service, arrival.tenant
    identity = f"cmpl-{uuid.uuid4().hex}"
    async with service.preparing():
        request, unknown = await read_form(arrival, CompletionRequest)
        service.backlog.check(tenant.id, len(request.prompt) * request.choices)
        handle = service.handles.open(tenant.id, identity, request_id.get())
        model, grammars = service.served(), service.grammars
        async with handle.preparing():
            chats = await prepare_texts(
                request, identity, model, grammars, arrival.run, tenant, handle
            )
    tokens = sum(len(chat.engine.prompt) for chat in chats)
    spending = Spending.of_all([chat.spending for chat in chats])

    def check() -> None:
        service.backlog.check(tenant.id, sum(chat.n for chat in chats), tokens)
        spending.check()

    backlog = service.backlog.together(check)
    source = text_chunks(
        request,
        identity,
        chats,
        lambda chat: chunks(chat, service.engine, backlog, service.metrics, arrival.began),
    )
    if chats[0].stream:
        encoded = events(source, include_usage=chats[0].include_usage)
        return told(
            answer_stream(arrival, chats[0], identity, encoded, f"completions/{identity}/events"),
            unknown,
        )
    return whole(await fold_text(source), unknown)
