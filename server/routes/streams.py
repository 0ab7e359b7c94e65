"""Streams of generated text: as the answer to a request, and for clients that come back to one."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from server.auth import Tenant
from server.chat.prepare import PreparedChat
from server.chat.sse import EventStream, OnError, last_words
from server.lifecycle import Service
from server.routes.body import Arrival
from wire.errors import InvalidRequest

router = APIRouter()


def answer_stream(
    arrival: Arrival,
    chat: PreparedChat,
    name: str,
    events: AsyncGenerator[bytes, None],
    place: str,
    on_error: OnError = last_words,
    first: int = 1,
) -> Response:
    """``events`` as the answer ``name`` to a request. If it was asked to be resumable, they are
    numbered from ``first`` on, and found again at ``place``, relative to the request."""
    service = arrival.service
    if chat.resumable:
        recordings = service.recordings
        recording = recordings.open(name, arrival.tenant.id, events, on_error, first)
        return recordings.stream(recording, place, arrival.held)
    return EventStream(events, service.settings.server.keep_alive_interval, on_error)


@router.get("/v1/chat/completions/{name}/events")
@router.get("/v1/completions/{name}/events")
@router.get("/v1/messages/{name}/events")
async def resume(
    name: str, request: Request, last_event_id: Annotated[str, Header()] = "0"
) -> Response:
    """Read a resumable stream behind the event that ``Last-Event-ID`` names, or from its
    beginning."""
    service: Service = request.app.state.service
    tenant: Tenant = request.state.tenant
    if not last_event_id.isdecimal() or len(last_event_id) > 20:
        raise InvalidRequest("Last-Event-ID must be a number.", param="Last-Event-ID")
    stream = service.recordings.resume(name, tenant.id, int(last_event_id), "Last-Event-ID")
    # To a 204 an EventSource comes back no more.
    return Response(status_code=204) if stream is None else stream
