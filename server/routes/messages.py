"""/v1/messages, Anthropic's API."""

import contextlib
import uuid
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response

from server.chat.stream import chunks
from server.dialects.anthropic import (
    as_chat,
    frame,
    last_words,
    message_events,
    message_of,
)
from server.dialects.draft import Origins
from server.routes.body import (
    Arrival,
    attend,
    count_prompt,
    prepare_chat,
    read_form,
    told,
    whole,
)
from server.routes.streams import answer_stream
from server.schemas.message import Event, TokenCount
from server.schemas.messages import CountRequest, MessagesRequest

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    return await attend(request, _answer)


async def _answer(arrival: Arrival) -> Response:
    service = arrival.service
    async with service.preparing():
        request, unknown = await read_form(arrival, MessagesRequest)
        asked, origins = await arrival.run(as_chat, request)
        with origins.named():
            identity = f"msg_{uuid.uuid4().hex}"
            chat = await prepare_chat(arrival, asked, identity)
    source = chunks(chat, service.engine, service.backlog, service.metrics, arrival.began)
    events = message_events(chat, source)
    if chat.stream:
        framed = _framed(events, origins)
        stream = answer_stream(
            arrival, chat, identity, framed, f"messages/{identity}/events", last_words
        )
        return told(stream, unknown)
    with origins.named():
        return whole(await message_of(events), unknown)


async def _framed(
    events: AsyncGenerator[Event, None], origins: Origins
) -> AsyncGenerator[bytes, None]:
    with origins.named():
        async with contextlib.aclosing(events):
            async for event in events:
                yield frame(event)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request) -> Response:
    """The tokens that a message would have as its input, without generating any."""
    return await attend(request, _count)


async def _count(arrival: Arrival) -> Response:
    request, unknown = await read_form(arrival, CountRequest)
    asked, origins = await arrival.run(as_chat, request)
    with origins.named():
        return whole(TokenCount(await count_prompt(arrival, asked)), unknown)
