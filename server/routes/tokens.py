"""/tokenize and /detokenize, as vLLM has them."""

import asyncio

import msgspec
from fastapi import APIRouter, Request, Response

from server.auth import Tenant
from server.chat.prepare import Run, ServedModel, check_model
from server.chat.preview import sketch
from server.chat.render import prompt_ids, whole_text
from server.chat.sampling import check_ids
from server.chat.sse import unless_gone
from server.lifecycle import Service
from server.routes.body import read_body, read_form, runner, told
from server.schemas.tokens import DetokenizeRequest, Text, TokenizeChat, TokenizeText, Tokens
from server.schemas.validate import decode_object, read_object

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a chat with its pictures and videos."""
    service: Service = request.app.state.service
    body = await read_body(request)
    return await unless_gone(request.receive, _tokens(service, body, request.state.tenant))


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    service: Service = request.app.state.service
    body = await read_body(request)
    run = runner(body)
    asked, unknown = await read_form(service, body, DetokenizeRequest, run)
    model = service.served()
    check_model(asked.model, model)
    check_ids("tokens", asked.tokens, model.ready.vocab_size)
    text = await run(whole_text, model.tokenizer, asked.tokens)
    return told(_json(Text(text)), unknown)


async def _tokens(service: Service, body: bytes, tenant: Tenant) -> Response:
    run = runner(body)
    model = service.served()
    raw = await run(decode_object, body)
    strict = service.settings.server.strict_fields
    if "messages" in raw:
        chat, unknown = await run(read_object, raw, TokenizeChat, strict)
        ids, named = await _of_chat(service, chat, tenant, run), chat.return_token_strs
    else:
        text, unknown = await run(read_object, raw, TokenizeText, strict)
        check_model(text.model, model)
        ids, named = await run(_of_text, model, text), text.return_token_strs
    found = Tokens(len(ids), model.ready.max_model_len, ids)
    if named:
        found.token_strs = await run(model.tokenizer.names, ids)
    return told(_json(found), unknown)


def _of_text(model: ServedModel, asked: TokenizeText) -> list[int]:
    return model.prompts.encode(
        asked.prompt,
        special=asked.parse_special is not False,
        bos=asked.add_special_tokens is not False,
    )


async def _of_chat(service: Service, asked: TokenizeChat, tenant: Tenant, run: Run) -> list[int]:
    limits = service.settings.media
    with service.metrics.counting_refusals():
        async with service.preparing():
            drawn = await sketch(asked, service.served(), service.media, limits, run, tenant)
        return await asyncio.to_thread(prompt_ids, drawn)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
