"""/tokenize and /detokenize, as vLLM has them."""

import asyncio

from fastapi import APIRouter, Request, Response

from server.chat.prepare import ServedModel, check_model
from server.chat.render import prompt_ids, whole_text
from server.chat.sampling import check_ids
from server.routes.body import Arrival, attend, draw, read_form, whole
from server.schemas.tokens import DetokenizeRequest, Text, TokenizeChat, TokenizeText, Tokens
from server.schemas.validate import decode_object, read_object

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a chat with its pictures and videos."""
    return await attend(request, _tokens)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return await attend(request, _text)


async def _text(arrival: Arrival) -> Response:
    asked, unknown = await read_form(arrival, DetokenizeRequest)
    model = arrival.service.served()
    check_model(asked.model, model)
    check_ids("tokens", asked.tokens, model.ready.vocab_size)
    text = await arrival.run(whole_text, model.tokenizer, asked.tokens)
    return whole(Text(text), unknown)


async def _tokens(arrival: Arrival) -> Response:
    run, model = arrival.run, arrival.service.served()
    raw = await run(decode_object, arrival.body)
    strict = arrival.service.settings.server.strict_fields
    if "messages" in raw:
        chat, unknown = await run(read_object, raw, TokenizeChat, strict)
        ids, named = await _of_chat(arrival, chat), chat.return_token_strs
    else:
        text, unknown = await run(read_object, raw, TokenizeText, strict)
        check_model(text.model, model)
        ids, named = await run(_of_text, model, text), text.return_token_strs
    found = Tokens(len(ids), model.ready.max_model_len, ids)
    if named:
        found.token_strs = await run(model.tokenizer.names, ids)
    return whole(found, unknown)


def _of_text(model: ServedModel, asked: TokenizeText) -> list[int]:
    return model.prompts.encode(
        asked.prompt,
        special=asked.parse_special is not False,
        bos=asked.add_special_tokens is not False,
    )


async def _of_chat(arrival: Arrival, asked: TokenizeChat) -> list[int]:
    with arrival.service.metrics.counting_refusals():
        return await asyncio.to_thread(prompt_ids, await draw(arrival, asked))
