"""/v1/chat/completions."""

import uuid

from fastapi import APIRouter, Request, Response

from server.chat.best_of import best
from server.chat.stream import chunks, events, fold
from server.routes.body import Arrival, attend, prepare_chat, read_form, told, whole
from server.routes.streams import answer_stream
from server.schemas.chat import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    return await attend(request, _answer)


async def _answer(arrival: Arrival) -> Response:
    service = arrival.service
    async with service.preparing():
        request, unknown = await read_form(arrival, ChatRequest)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        chat = await prepare_chat(arrival, request, identity)
    engine, backlog, metrics, began = (
        *(service.engine, service.backlog, service.metrics),
        arrival.began,
    )
    if chat.contest is None:
        source = chunks(chat, engine, backlog, metrics, began)
    else:
        source = best(chat, chat.contest, engine, backlog, metrics, began, service.preparing)
    if chat.stream:
        encoded = events(source, include_usage=chat.include_usage)
        return told(
            answer_stream(arrival, chat, identity, encoded, f"completions/{identity}/events"),
            unknown,
        )
    return whole(await fold(source), unknown)
