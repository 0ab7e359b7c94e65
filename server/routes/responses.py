"""/v1/responses."""

import asyncio
import dataclasses
import functools
import uuid
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response

from server.chat.prepare import PreparedChat
from server.chat.stream import chunks
from server.dialects.background import Running
from server.dialects.responses import (
    BEFORE,
    PICTURES,
    answers_of,
    as_chat,
    begun,
    items_of,
    last_words,
    page,
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
    run_for,
    told,
    whole,
)
from server.routes.streams import answer_stream
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
        earlier = sum(map(len, before))
        asked, origins = await run_for(len(arrival.body) + earlier)(as_chat, request, before)
        with origins.named():
            identity = f"resp_{uuid.uuid4().hex}"
            chat = await prepare_chat(arrival, asked, identity, earlier)
        items = (*before, *await run(items_of, request)) if request.store is not False else ()
    response = begun(chat, request)

    def keep(response: ResponseObject) -> None:
        if response.store:
            entry = _entry(response, items)
            response.store = service.responses.put(tenant.id, response.id, entry)

    source = chunks(chat, service.engine, service.backlog, service.metrics, arrival.began)
    events = response_events(response, source, keep)
    if not chat.stream and not response.background:
        with origins.named():
            await response_of(events)
        return whole(response, unknown)
    stream = stream_of(response, events, origins, keep)
    place = f"responses/{identity}?stream=true"
    if not response.background:
        answer = answer_stream(arrival, chat, identity, stream, place, last_words, first=0)
        return told(answer, unknown)
    with origins.named():
        _check(arrival, chat, _entry(response, items))
    stream = service.background.add(tenant.id, Running(response, items), stream)
    recordings = service.recordings
    recording = recordings.open(identity, tenant.id, stream, last_words, first=0, lasting=True)
    recording.begin(arrival.held)
    return (
        told(recordings.stream(recording, place), unknown)
        if chat.stream
        else whole(response, unknown)
    )


def _entry(response: ResponseObject, items: tuple[bytes, ...]) -> Stored:
    return Stored(msgspec.json.encode(response), (*items, *answers_of(response)), len(items))


def _check(arrival: Arrival, chat: PreparedChat, entry: Stored) -> None:
    """Raise what would end a response in the background at once."""
    service = arrival.service
    service.backlog.check(arrival.tenant.id, chat.n, len(chat.engine.prompt))
    chat.spending.check()
    if not service.responses.fits(entry):
        raise InvalidRequest(
            "background: this server has no room to keep the response.", param="background"
        )


def _before(arrival: Arrival, request: ResponsesRequest) -> tuple[bytes, ...]:
    """The items of the conversation that a request goes on with. Raises NotFound, and BodyTooLarge
    where they would be too large if they were sent."""
    if request.previous_response_id is None:
        return ()
    service = arrival.service
    found = service.responses.get(arrival.tenant.id, request.previous_response_id)
    if found is None:
        raise NotFound(
            "previous_response_id: there is no such response (any more), or it is not over.",
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
    before = _before(arrival, request)
    run = run_for(len(arrival.body) + sum(map(len, before)))
    asked, origins = await run(as_chat, request, before)
    arrival = dataclasses.replace(arrival, run=run)
    with origins.named():
        return whole(InputTokens(await count_prompt(arrival, asked)), unknown)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str,
    request: Request,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """A response that is kept or runs in the background; or its events, from the beginning or
    behind one of them."""
    service, tenant = _asked(request)
    recording = service.recordings.find(response_id, tenant)
    if stream and recording is not None:
        name = "starting_after"
        events = service.recordings.resume(response_id, tenant, starting_after, name)
        return Response(status_code=204) if events is None else events
    running = service.background.find(tenant, response_id)
    if running is not None:
        return whole(running.response, ())
    found = _kept(service, tenant, response_id)
    if recording is not None:
        recording.release()
    if stream:
        raise InvalidRequest(
            "stream: the events of this response were not kept, or are no longer.", param="stream"
        )
    return Response(found.body, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a response; one that runs in the background is cancelled."""
    service, tenant = _asked(request)
    running = service.background.find(tenant, response_id)
    if running is not None:
        await _cancel(service, tenant, running)
    if not service.responses.delete(tenant, response_id):
        raise _no_response()
    recording = service.recordings.find(response_id, tenant)
    if recording is not None:
        service.recordings.forget(recording)
    return whole(ResponseDeleted(response_id), ())


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response in the background. One that is over stays as it is."""
    service, tenant = _asked(request)
    running = service.background.find(tenant, response_id)
    if running is not None:
        await _cancel(service, tenant, running)
        return whole(running.response, ())
    found = _kept(service, tenant, response_id)
    if not msgspec.json.decode(found.body, type=_Mode).background:
        raise InvalidRequest(
            "Only a response with background: true can be cancelled.", param="response_id"
        )
    return Response(found.body, media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    include: Annotated[list[str], Query(alias="include[]")] = [],  # noqa: B006
) -> Response:
    """The items that a response answers, those of its conversation before it included, page by
    page."""
    service, tenant = _asked(request)
    running = service.background.find(tenant, response_id)
    if running is None:
        found = _kept(service, tenant, response_id)
        items = found.items[: found.asked]
    else:
        items = running.items
    shown = functools.partial(page, descending=order == "desc", pictures=PICTURES in include)
    return whole(await asyncio.to_thread(shown, items, after, limit), ())


class _Mode(msgspec.Struct):
    # The rest, which may be megabytes, is passed over.
    background: bool


def _asked(request: Request) -> tuple[Service, bytes]:
    return request.app.state.service, request.state.tenant.id


def _kept(service: Service, tenant: bytes, name: str) -> Stored:
    found = service.responses.get(tenant, name)
    if found is None:
        raise _no_response()
    return found


async def _cancel(service: Service, tenant: bytes, running: Running) -> None:
    name = running.response.id
    service.handles.abort(tenant, name)
    await running.over.wait()
    recording = service.recordings.find(name, tenant)
    if recording is not None:
        recording.release()


def _no_response() -> NotFound:
    return NotFound("There is no such response (any more).", param="response_id")
