"""From a completions request to one prepared chat for each of its prompts."""

import dataclasses
import secrets

import msgspec

from server.auth import Tenant
from server.chat.grounding import BoxReader
from server.chat.prepare import (
    PreparedChat,
    Run,
    ServedModel,
    engine_request,
    settle,
    spending,
)
from server.chat.sampling import fit_sampling
from server.chat.usage import Meter
from server.grammars import GrammarChecker
from server.handles import Handle
from server.schemas.completion import MAX_TEXTS, CompletionRequest, TextPrompt
from wire.errors import InvalidRequest
from wire.sampling import MAX_SEED, SamplingParams
from wire.spans import span


async def prepare_texts(
    request: CompletionRequest,
    identity: str,
    model: ServedModel,
    grammars: GrammarChecker,
    run: Run,
    tenant: Tenant,
    handle: Handle,
) -> list[PreparedChat]:
    """Check and tokenise. Raises ClientErrors."""
    number = len(request.prompt)
    if number * request.choices > MAX_TEXTS:
        raise InvalidRequest(
            f"prompt: {number} prompts with {request.n} choices each are more than {MAX_TEXTS}.",
            param="prompt",
        )
    sampling = await settle(request, model, grammars, run, tenant)
    chats = []
    for index, prompt in enumerate(request.prompt):
        with span("prompt"):
            ids = await run(read_prompt, prompt, request, model)
        if request.seed is None:
            # Two equal prompts want two answers.
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbelow(MAX_SEED))
        chat = _chat(request, f"{identity}-{index}", ids, sampling, model, tenant)
        chats.append(dataclasses.replace(chat, handle=handle))
    return chats


def read_prompt(prompt: TextPrompt, request: CompletionRequest, model: ServedModel) -> list[int]:
    """The ids of a prompt. Raises InvalidRequest, ContextTooLong."""
    if isinstance(prompt.content, str):
        ids = model.prompts.read(
            prompt.content,
            prompt.where,
            special=request.parse_special is not False,
            bos=request.add_special_tokens is not False,
        )
        if not ids:
            raise InvalidRequest(f"{prompt.where} must not be empty.", param=prompt.where)
        return ids
    model.prompts.check_ids(prompt.content, prompt.where, model.ready.vocab_size)
    return prompt.content


def _chat(
    request: CompletionRequest,
    identity: str,
    ids: list[int],
    sampling: SamplingParams,
    model: ServedModel,
    tenant: Tenant,
) -> PreparedChat:
    fitted = fit_sampling(sampling, request, len(ids), model.ready.context())
    options = request.stream_options
    return PreparedChat(
        engine=engine_request(request, identity, ids, [], fitted, tenant),
        buffers=[],
        n=request.choices,
        model=model,
        stops=tuple(request.stop or ()),
        show_stop=bool(request.include_stop_str_in_output),
        boxes=BoxReader(model.tokenizer),
        parse_tools=False,
        max_calls=None,
        called_reason="stop",
        skip_special_tokens=request.skip_special_tokens is not False,
        token_ids=bool(request.return_token_ids),
        echo="",
        continues=True,
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
        resumable=bool(options is not None and options.resumable),
        shown=[],
        meter=Meter([], []),
        media_seconds=0.0,
        spending=spending(request, fitted, len(ids), [], tenant),
    )
