"""Streams of generated text: as the answer to a request, and for clients that come back to one."""

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from server.auth import Tenant
from server.chat.prepare import PreparedChat
from server.chat.sse import EventStream
from server.lifecycle import Service
from server.routes.body import Arrival
from wire.errors import InvalidRequest

router = APIRouter()


def answer_stream(
    arrival: Arrival, chat: PreparedChat, name: str, events: AsyncGenerator[bytes, None]
) -> Response:
    """``events`` as the answer ``name`` to a request."""
    service = arrival.service
    if chat.resumable:
        return service.recordings.stream(name, arrival.tenant.id, events, arrival.held)
    return EventStream(events, service.settings.server.keep_alive_interval)


@router.get("/v1/chat/completions/{name}/events")
@router.get("/v1/completions/{name}/events")
async def resume(
    name: str, request: Request, last_event_id: Annotated[str, Header()] = "0"
) -> Response:
    """Read a resumable stream behind the event that ``Last-Event-ID`` names, or from its
    beginning."""
    service: Service = request.app.state.service
    tenant: Tenant = request.state.tenant
    if not last_event_id.isdecimal() or len(last_event_id) > 20:
        raise InvalidRequest("Last-Event-ID must be a number.", param="Last-Event-ID")
    stream = service.recordings.resume(name, tenant.id, int(last_event_id))
    # To a 204 an EventSource comes back no more.
    return Response(status_code=204) if stream is None else stream
