"""/v1/responses."""

import uuid

import msgspec
from fastapi import APIRouter, Request, Response

from server.chat.sse import EventStream
from server.chat.stream import chunks
from server.dialects.responses import (
    BEFORE,
    as_chat,
    begun,
    items_of,
    last_words,
    response_events,
    response_of,
    stream_of,
)
from server.dialects.store import Stored
from server.lifecycle import Service
from server.routes.body import (
    Arrival,
    attend,
    count_prompt,
    prepare_chat,
    read_form,
    told,
    whole,
)
from server.schemas.response import InputTokens, ResponseDeleted, ResponseObject
from server.schemas.responses import ResponsesRequest
from wire.errors import BodyTooLarge, InvalidRequest, NotFound

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of server-sent events."""
    return await attend(request, _answer)


async def _answer(arrival: Arrival) -> Response:
    service, tenant, run = arrival.service, arrival.tenant, arrival.run
    async with service.preparing():
        request, unknown = await read_form(arrival, ResponsesRequest)
        before = _before(arrival, request)
        asked, origins = await run(as_chat, request, before)
        with origins.named():
            identity = f"resp_{uuid.uuid4().hex}"
            chat = await prepare_chat(arrival, asked, identity)
        items = await run(items_of, request) if request.store is not False else ()
    response = begun(chat, request)

    def keep(response: ResponseObject) -> None:
        if response.store:
            output = tuple(map(msgspec.json.encode, response.output))
            entry = Stored(msgspec.json.encode(response), (*before, *items, *output))
            response.store = service.responses.put(tenant.id, response.id, entry)

    source = chunks(chat, service.engine, service.backlog, service.metrics, arrival.began)
    events = response_events(response, source, keep)
    if chat.stream:
        interval = service.settings.server.keep_alive_interval
        stream = stream_of(response, events, origins)
        return told(EventStream(stream, interval, last_words), unknown)
    with origins.named():
        await response_of(events)
    return whole(response, unknown)


def _before(arrival: Arrival, request: ResponsesRequest) -> tuple[bytes, ...]:
    """The items of the conversation that a request goes on with. Raises NotFound, and BodyTooLarge
    where they would be too large if they were sent."""
    if request.previous_response_id is None:
        return ()
    service = arrival.service
    found = service.responses.get(arrival.tenant.id, request.previous_response_id)
    if found is None:
        raise NotFound(
            "previous_response_id: there is no such response (any more).",
            param=BEFORE,
            code="previous_response_not_found",
        )
    most = service.settings.server.max_request_bytes
    if len(arrival.body) + sum(map(len, found.items)) > most:
        raise BodyTooLarge(
            f"previous_response_id: with this request it has more than {most} bytes.",
            param=BEFORE,
        )
    return found.items


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(request: Request) -> Response:
    """The tokens that a response would have as its input, without generating any."""
    return await attend(request, _count)


async def _count(arrival: Arrival) -> Response:
    request, unknown = await read_form(arrival, ResponsesRequest)
    asked, origins = await arrival.run(as_chat, request, _before(arrival, request))
    with origins.named():
        return whole(InputTokens(await count_prompt(arrival, asked)), unknown)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, request: Request) -> Response:
    """A response that is kept."""
    if request.query_params.get("stream") == "true":
        raise InvalidRequest("stream: a response that is over is not streamed.", param="stream")
    service: Service = request.app.state.service
    found = service.responses.get(request.state.tenant.id, response_id)
    if found is None:
        raise _no_response()
    return Response(found.body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a response."""
    service: Service = request.app.state.service
    if not service.responses.delete(request.state.tenant.id, response_id):
        raise _no_response()
    return whole(ResponseDeleted(response_id), ())


def _no_response() -> NotFound:
    return NotFound("There is no such response (any more).", param="response_id")
