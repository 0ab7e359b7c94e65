"""What the routes that take a body share: its arrival, reading it, and preparing a chat for the
engine."""

import asyncio
import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response

from server.auth import Tenant
from server.chat.prepare import PreparedChat, Run, prepare
from server.chat.preview import Sketch, preview, sketch
from server.chat.showing import Room
from server.chat.sse import unless_gone
from server.errors import UnsupportedMediaType
from server.lifecycle import Service
from server.schemas.chat import ChatRequest, ImagePart
from server.schemas.validate import F, parse_request
from wire.logs import request_id
from wire.spans import span

# Larger bodies are read and tokenised in a thread; for smaller ones it costs more than it saves.
THREAD_BYTES = 1 << 14

# Fields that a header names at most.
MAX_TOLD = 16
_UNSAFE = re.compile(r"[^A-Za-z0-9_.$\[\]-]")

_T = TypeVar("_T")

# What a client sends that says nothing about its body, and what curl says of it by default.
_UNSAID = ("", "application/x-www-form-urlencoded")


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request whose body is here. ``began`` is the ``time.monotonic`` of its first byte; ``held``
    is let go behind the last byte of the answer. ``run`` does the work on such a body."""

    service: Service
    body: bytes
    tenant: Tenant
    held: contextlib.AsyncExitStack
    began: float
    run: Run

    @property
    def room(self) -> Room:
        """Waits for room for tiles, which the request then holds."""
        return functools.partial(self.service.tile_room, self.held)


async def attend(request: Request, answer: Callable[[Arrival], Awaitable[Response]]) -> Response:
    """What ``answer`` makes of a request, as long as its client is there. Raises ClientGone, and
    what reading the body and ``answer`` raise."""
    began = time.monotonic()
    service: Service = request.app.state.service
    with span("read") as reading:
        body = await _read_body(request)
        reading.set({"http.request.body.size": len(body)})
    run = run_for(len(body))
    held: contextlib.AsyncExitStack = request.scope["held"]
    arrival = Arrival(service, body, request.state.tenant, held, began, run)
    return await unless_gone(request.receive, answer(arrival))


async def _read_body(request: Request) -> bytes:
    """The bytes of a body that says it is JSON, or says nothing. Raises UnsupportedMediaType, and
    Unavailable when the server stops meanwhile."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A browser sends forms and untyped bodies for any page without asking us first; for JSON it
    # asks. So pages, which have an origin, must say that it is JSON.
    if kind != "application/json" and (kind not in _UNSAID or "origin" in request.headers):
        raise UnsupportedMediaType("Content-Type must be application/json.")
    check_unpacked(request)
    service: Service = request.app.state.service
    async with service.preparing():
        return await request.body()


def check_unpacked(request: Request) -> None:
    """Raises UnsupportedMediaType for a body that says it is packed."""
    codings = request.headers.getlist("content-encoding") or ["identity"]
    if any(coding.strip().lower() != "identity" for coding in codings):
        raise UnsupportedMediaType("Content-Encoding must be identity: the body as it is.")


async def read_form(arrival: Arrival, form: type[F]) -> tuple[F, list[str]]:
    """What a body asks for, and the fields in it that nobody knows. Raises InvalidRequest."""
    strict = arrival.service.settings.server.strict_fields
    return await arrival.run(parse_request, arrival.body, form, strict)


def whole(answer: object, unknown: Sequence[str]) -> Response:
    """An answer as JSON, ``told`` of such fields."""
    return told(Response(msgspec.json.encode(answer), media_type="application/json"), unknown)


def told(response: Response, unknown: Sequence[str]) -> Response:
    """``response``, with a header that names such fields: some of them, if there are many."""
    if unknown:
        safe = [_UNSAFE.sub("?", name) for name in unknown[:MAX_TOLD]]
        more = ["..."] if len(unknown) > MAX_TOLD else []
        response.headers["X-InternVL-Ignored-Fields"] = ", ".join(safe + more)
    return response


async def prepare_chat(
    arrival: Arrival, request: ChatRequest, identity: str, before: int = 0
) -> PreparedChat:
    """Make a chat ready for the engine; ``identity`` is the answer's id, and so many bytes of the
    conversation came ``before`` this body. Raises what ``prepare`` raises, TooManyRequests, and
    RequestAborted."""
    service, tenant = arrival.service, arrival.tenant
    # From here on pictures pass by unread, until somebody decodes them.
    run = run_for(before + len(arrival.body) - _picture_bytes(request))
    service.backlog.check(tenant.id, request.choices)
    metrics = service.metrics
    handle = service.handles.open(tenant.id, identity, request_id.get())
    async with handle.preparing():
        with metrics.counting_refusals():
            chat = await prepare(
                request,
                identity,
                service.served(),
                service.media,
                service.settings.media,
                service.grammars,
                run,
                tenant,
                service.files,
                arrival.room,
                service.critic,
            )
    if chat.shown:
        metrics.media_time.observe(chat.media_seconds)
        facts, spent = zip(*((one.facts, one.spent) for one in chat.shown), strict=True)
        metrics.observe_media(facts, spent)
    return dataclasses.replace(chat, handle=handle)


async def draw(arrival: Arrival, request: ChatRequest) -> Sketch:
    """The prompt of a chat, from headers alone. Raises what ``sketch`` raises."""
    service, limits = arrival.service, arrival.service.settings.media
    async with service.preparing():
        return await sketch(
            request,
            service.served(),
            service.media,
            limits,
            arrival.run,
            arrival.tenant,
            service.files,
        )


async def count_prompt(arrival: Arrival, request: ChatRequest) -> int:
    """The tokens that the prompt of a chat would have. Raises what ``sketch`` raises."""
    with arrival.service.metrics.counting_refusals():
        drawn = await draw(arrival, request)
        return (await asyncio.to_thread(preview, drawn)).prompt_tokens


def _picture_bytes(request: ChatRequest) -> int:
    return sum(
        len(part.image_url.url)
        for message in request.messages
        for part in message.content or ()
        if isinstance(part, ImagePart)
    )


def run_for(size: int) -> Run:
    """What does the work on so many bytes."""
    return asyncio.to_thread if size > THREAD_BYTES else _here


async def _here(function: Callable[..., _T], /, *arguments: Any) -> _T:
    return function(*arguments)
