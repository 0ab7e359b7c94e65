"""What the routes that take a chat request share: reading its body."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from server.chat.prepare import Run
from server.errors import UnsupportedMediaType
from server.lifecycle import Service

# Larger bodies are read and tokenised in a thread; for smaller ones it costs more than it saves.
THREAD_BYTES = 1 << 14

_T = TypeVar("_T")


async def read_body(request: Request) -> bytes:
    """The bytes of a body that says it is JSON. Raises UnsupportedMediaType, and Unavailable when
    the server stops meanwhile."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("Content-Type must be application/json.")
    service: Service = request.app.state.service
    async with service.preparing():
        return await request.body()


def runner(body: bytes) -> Run:
    """Where the work on such a body is done: here, or in a thread."""
    return asyncio.to_thread if len(body) > THREAD_BYTES else _here


async def _here(function: Callable[..., _T], /, *arguments: Any) -> _T:
    return function(*arguments)
