"""What the routes that take a request for generated text share: reading its body, and preparing a
chat for the engine."""

import asyncio
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response

from server.auth import Tenant
from server.chat.prepare import PreparedChat, Run, prepare
from server.chat.preview import preview, sketch
from server.chat.showing import Room
from server.errors import UnsupportedMediaType
from server.lifecycle import Service
from server.schemas.chat import ChatRequest
from server.schemas.validate import F, parse_request
from wire.logs import request_id

# Larger bodies are read and tokenised in a thread; for smaller ones it costs more than it saves.
THREAD_BYTES = 1 << 14

# Fields that a header names at most.
MAX_TOLD = 16
_UNSAFE = re.compile(r"[^A-Za-z0-9_.$\[\]-]")

_T = TypeVar("_T")


# What a client sends that says nothing about its body, and what curl says of it by default.
_UNSAID = ("", "application/x-www-form-urlencoded")


async def read_body(request: Request) -> bytes:
    """The bytes of a body that says it is JSON, or says nothing. Raises UnsupportedMediaType, and
    Unavailable when the server stops meanwhile."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A browser sends forms and untyped bodies for any page without asking us first; for JSON it
    # asks. So pages, which have an origin, must say that it is JSON.
    if kind != "application/json" and (kind not in _UNSAID or "origin" in request.headers):
        raise UnsupportedMediaType("Content-Type must be application/json.")
    service: Service = request.app.state.service
    async with service.preparing():
        return await request.body()


async def read_form(service: Service, body: bytes, form: type[F], run: Run) -> tuple[F, list[str]]:
    """What a body asks for, and the fields in it that nobody knows. Raises InvalidRequest."""
    return await run(parse_request, body, form, service.settings.server.strict_fields)


def told(response: Response, unknown: Sequence[str]) -> Response:
    """``response``, with a header that names such fields: some of them, if there are many."""
    if unknown:
        safe = [_UNSAFE.sub("?", name) for name in unknown[:MAX_TOLD]]
        more = ["..."] if len(unknown) > MAX_TOLD else []
        response.headers["X-InternVL-Ignored-Fields"] = ", ".join(safe + more)
    return response


def runner(body: bytes) -> Run:
    """Where the work on such a body is done: here, or in a thread."""
    return asyncio.to_thread if len(body) > THREAD_BYTES else _here


async def prepare_chat(
    service: Service, request: ChatRequest, identity: str, run: Run, tenant: Tenant, room: Room
) -> PreparedChat:
    """Make a chat ready for the engine; ``identity`` is the answer's id. Raises what ``prepare``
    raises, TooManyRequests, and RequestAborted."""
    service.backlog.check(tenant.id, request.n or 1)
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
                room,
            )
    if chat.shown:
        metrics.media_time.observe(chat.media_seconds)
        metrics.observe_media([shown.facts for shown in chat.shown])
    return dataclasses.replace(chat, handle=handle)


async def count_prompt(service: Service, request: ChatRequest, run: Run, tenant: Tenant) -> int:
    """The tokens that the prompt of a chat would have. Raises what ``sketch`` raises."""
    limits = service.settings.media
    with service.metrics.counting_refusals():
        async with service.preparing():
            drawn = await sketch(request, service.served(), service.media, limits, run, tenant)
        return (await asyncio.to_thread(preview, drawn)).prompt_tokens


async def _here(function: Callable[..., _T], /, *arguments: Any) -> _T:
    return function(*arguments)
