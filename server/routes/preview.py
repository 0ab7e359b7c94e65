"""/v1/internvl/preview and /v1/chat/completions/render."""

import asyncio
import functools
from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from server.chat.preview import Sketch, preview
from server.chat.render import render
from server.routes.body import Arrival, attend, draw, read_form, whole
from server.schemas.chat import ChatRequest
from server.schemas.preview import Preview, Render

router = APIRouter()


@router.post("/v1/internvl/preview")
async def preview_chat_completion(request: Request) -> Response:
    """What a chat request would cost; its body is that of a chat request."""
    return await attend(request, functools.partial(_answer, preview))


@router.post("/v1/chat/completions/render")
async def render_chat_completion(request: Request) -> Response:
    """The prompt of a chat request, and where its pictures and videos are in it."""
    return await attend(request, functools.partial(_answer, render))


async def _answer(tell: Callable[[Sketch], Preview | Render], arrival: Arrival) -> Response:
    asked, unknown = await read_form(arrival, ChatRequest)
    with arrival.service.metrics.counting_refusals():
        return whole(await asyncio.to_thread(tell, await draw(arrival, asked)), unknown)
