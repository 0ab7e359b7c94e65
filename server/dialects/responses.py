"""OpenAI's Responses API: its request as a chat request, and chunks as its events. The answer
without streaming is the response that the last event holds."""

import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import msgspec

from server.chat.prepare import PreparedChat
from server.chat.sse import known
from server.dialects.draft import Draft, Origins
from server.files import as_url
from server.schemas.answer import Chunk, ChunkChoice
from server.schemas.chat import ChatRequest
from server.schemas.common import TokenLogprob, Usage
from server.schemas.response import (
    CallArgumentsDelta,
    CallArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    Event,
    IncompleteDetails,
    InputDetails,
    InputItems,
    OutputCall,
    OutputDetails,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseQueued,
    ResponseUsage,
    StreamError,
)
from server.schemas.responses import (
    ITEM,
    AllowedTools,
    AssistantItem,
    CallItem,
    FunctionChoice,
    InputFile,
    InputText,
    InstructionItem,
    OutputTextPart,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
    SchemaFormat,
    UserItem,
)
from server.schemas.validate import decode
from wire.errors import BodyTooLarge, EngineFailed, InvalidRequest, RequestAborted, ServiceError

LOGPROBS = "message.output_text.logprobs"
BEFORE = "previous_response_id"
PICTURES = "message.input_image.image_url"

_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}


def as_chat(request: ResponsesRequest, before: Sequence[bytes]) -> tuple[ChatRequest, Origins]:
    """The chat request that a request asks, and where its fields come from; ``before`` are the
    items of the conversation that it goes on with. Raises InvalidRequest, BodyTooLarge."""
    draft = Draft(request, _NAMES)
    if request.instructions:
        draft.message("system", "instructions")
        draft.text(request.instructions, "instructions")
    # All at once: what bounds the work for one body holds for a conversation too.
    try:
        whole = decode(b"[" + b",".join(before) + b"]")
    except BodyTooLarge:
        raise BodyTooLarge(
            f"{BEFORE}: the conversation has too many parts to go on with.", param=BEFORE
        ) from None
    earlier = [(ITEM.validate_python(item), BEFORE) for item in whole]
    now = [(item, f"input[{number}]") for number, item in enumerate(request.input)]
    items = [*earlier, *now]
    for is_result, run in itertools.groupby(items, lambda one: isinstance(one[0], ResultItem)):
        if is_result:
            _results(draft, list(run))
            continue
        for item, where in run:
            _add(draft, item, where)
    _tools(draft, request)
    _form(draft, request)
    asks_logprobs = LOGPROBS in (request.include or ())
    draft.fields["max_completion_tokens"] = request.max_output_tokens
    draft.fields["logprobs"] = asks_logprobs or bool(request.top_logprobs)
    draft.fields["top_logprobs"] = request.top_logprobs
    draft.fields["visual_budget"] = request.visual_budget
    draft.fields["preprocess"] = request.preprocess
    draft.fields["v2pe_delta"] = request.v2pe_delta
    return draft.finish(), draft.origins


def _results(draft: Draft, results: list[tuple[ResultItem, str]]) -> None:
    """In the order of their calls: they have no other mark in the prompt."""
    places = [draft.place(item.call_id, f"{where}.call_id") for item, where in results]
    for _, (item, where) in sorted(zip(places, results, strict=True), key=lambda one: one[0]):
        draft.message("tool", where)
        _show(draft, item, f"{where}.output")


def _add(
    draft: Draft,
    item: InstructionItem | UserItem | AssistantItem | CallItem | ReasoningItem,
    where: str,
) -> None:
    if isinstance(item, CallItem):
        if draft.last_role != "assistant":
            draft.message("assistant", where)
        draft.call(item.call_id, item.name, item.arguments, where, "arguments")
    elif isinstance(item, AssistantItem):
        draft.message("assistant", where)
        for number, part in enumerate(item.content):
            text = part.text if isinstance(part, OutputTextPart) else part.refusal
            draft.text(text, f"{where}.content[{number}]")
    elif not isinstance(item, ReasoningItem):
        draft.message("user" if isinstance(item, UserItem) else "system", where)
        _show(draft, item, f"{where}.content")


def _show(draft: Draft, item: InstructionItem | UserItem | ResultItem, where: str) -> None:
    for number, part in enumerate(item.output if isinstance(item, ResultItem) else item.content):
        here = f"{where}[{number}]"
        if isinstance(part, InputText):
            draft.text(part.text, f"{here}.text")
        elif isinstance(part, InputFile):
            draft.file(part.file_id, here, part, part.detail)
        else:
            detail = "high" if part.detail == "original" else part.detail
            if part.file_id is None:
                draft.picture(part.image_url or "", here, f"{here}.image_url", part, detail)
            else:
                draft.picture(as_url(part.file_id), here, f"{here}.file_id", part, detail)


def _tools(draft: Draft, request: ResponsesRequest) -> None:
    if request.tools is not None:
        draft.fields["tools"] = [
            {"type": "function", "function": _sent(tool, {"type"})} for tool in request.tools
        ]
    for number in range(len(request.tools or ())):
        draft.origins.add(f"tools[{number}].function", f"tools[{number}]")
    choice: Any = request.tool_choice
    if isinstance(choice, FunctionChoice):
        choice = _named(choice)
    elif isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": [_named(one) for one in choice.tools]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
    draft.fields["tool_choice"] = choice
    draft.fields["parallel_tool_calls"] = request.parallel_tool_calls


def _named(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _form(draft: Draft, request: ResponsesRequest) -> None:
    form = request.text.format if request.text is not None else None
    if isinstance(form, SchemaFormat):
        schema = {"name": form.name, "schema": form.definition, "strict": form.strict}
        draft.fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form is not None:
        draft.fields["response_format"] = {"type": form.type}


def _sent(form: Any, without: set[str] | None = None) -> dict[str, Any]:
    """What a client has sent of a form, by the client's names."""
    return {
        type(form).model_fields[name].alias or name: getattr(form, name)
        for name in form.model_fields_set - (without or set())
        if name in type(form).model_fields
    }


class _Named(msgspec.Struct):
    id: str = ""


def page(
    items: Sequence[bytes], after: str | None, limit: int, *, descending: bool, pictures: bool
) -> InputItems:
    """So many of ``items``, each as JSON, from behind the one whose id is ``after``; with the URLs
    of ``pictures`` if they are wanted. Raises InvalidRequest."""
    ordered = items[::-1] if descending else items
    start = 0
    if after is not None:
        ids = [msgspec.json.decode(item, type=_Named).id for item in ordered]
        if after not in ids:
            raise InvalidRequest("after must be the id of an item of this response.", param="after")
        start = ids.index(after) + 1
    shown = [msgspec.json.decode(item) for item in ordered[start : start + limit]]
    if not pictures:
        for item in shown:
            for part in [*item.get("content", ()), *item.get("output", ())]:
                part.pop("image_url", None)
    names = [item["id"] for item in shown]
    first, last = (names[0], names[-1]) if names else (None, None)
    return InputItems(shown, first, last, start + limit < len(items))


def items_of(request: ResponsesRequest) -> tuple[bytes, ...]:
    """The items of a request as JSON, which ``ITEM`` reads again."""
    return tuple(msgspec.json.encode(_complete(item)) for item in request.input)


def answers_of(response: ResponseObject) -> tuple[bytes, ...]:
    """The items of an answer likewise. Log-probabilities are no part of a conversation, and would
    be most of it."""
    return tuple(msgspec.json.encode(_without_logprobs(item)) for item in response.output)


def _without_logprobs(item: OutputMessage | OutputCall) -> OutputMessage | OutputCall:
    if isinstance(item, OutputCall):
        return item
    parts = [msgspec.structs.replace(part, logprobs=[]) for part in item.content]
    return msgspec.structs.replace(item, content=parts)


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
# What OpenAI's client expects of an item or of a part of its content.
_ALWAYS: dict[str, dict[str, Any]] = {
    "reasoning": {"summary": []},
    "input_image": {"detail": "auto"},
    "output_text": {"annotations": []},
}


def _complete(item: Any) -> dict[str, Any]:
    """An item with all that it has when it is told again."""
    kind = item.type or "message"
    identity = f"{_PREFIXES.get(kind, 'rs')}_{uuid.uuid4().hex}"
    told = {"id": identity, "type": kind, "status": "completed", **_ALWAYS.get(kind, {})}
    told |= item.model_dump(exclude_none=True)
    for name in {"content", "output"} & told.keys():
        told[name] = [_ALWAYS.get(part["type"], {}) | part for part in told[name]]
    return told


def begun(chat: PreparedChat, request: ResponsesRequest) -> ResponseObject:
    """The response that a request gets, before it has an output."""
    sampling = chat.engine.sampling
    form = request.text.format if request.text is not None else None
    choice = request.tool_choice
    return ResponseObject(
        id=chat.engine.id,
        created_at=int(time.time()),
        model=chat.model.name,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        store=request.store is not False,
        background=bool(request.background),
        status="queued" if request.background else "in_progress",
        temperature=sampling.temperature,
        text={"format": {"type": "text"} if form is None else _sent(form)},
        tool_choice=_told(choice),
        tools=[
            {"description": None, "parameters": None, "strict": None} | _sent(tool)
            for tool in request.tools or ()
        ],
        top_logprobs=request.top_logprobs or 0,
        top_p=sampling.top_p,
    )


def _told(choice: Any) -> str | dict[str, Any]:
    if isinstance(choice, AllowedTools):
        return {**_sent(choice), "tools": [_sent(tool) for tool in choice.tools]}
    if isinstance(choice, FunctionChoice):
        return _sent(choice)
    return choice or "auto"


class _Items:
    """The items of an answer on its way; the last one may be open."""

    def __init__(self, response: ResponseObject) -> None:
        self._response = response
        self._open: OutputMessage | OutputCall | None = None
        self._logprobs: list[TokenLogprob] = []

    @property
    def _index(self) -> int:
        return len(self._response.output) - 1

    def add(self, choice: ChunkChoice) -> Iterator[Event]:
        """What a chunk makes of them."""
        delta = choice.delta
        of_call = delta.tool_calls or (isinstance(self._open, OutputCall) and not delta.content)
        if choice.logprobs is not None and not of_call:
            self._logprobs += choice.logprobs.content
        if isinstance(delta.content, str) and delta.content:
            if not isinstance(self._open, OutputMessage):
                message = OutputMessage(f"msg_{uuid.uuid4().hex}", [])
                yield from self._begin(message)
                message.content.append(OutputText("", [], []))
                yield ContentPartAdded(message.id, self._index, 0, message.content[0])
            yield from self._write(delta.content)
        for call in delta.tool_calls or ():
            if isinstance(call.id, str) and isinstance(call.function.name, str):
                item = OutputCall(f"fc_{uuid.uuid4().hex}", call.id, call.function.name)
                yield from self._begin(item)
            if call.function.arguments and isinstance(self._open, OutputCall):
                self._open.arguments += call.function.arguments
                yield CallArgumentsDelta(self._open.id, self._index, call.function.arguments)

    def _write(self, text: str) -> Iterator[Event]:
        if isinstance(self._open, OutputMessage):
            part = self._open.content[0]
            part.text += text
            part.logprobs += self._logprobs
            yield OutputTextDelta(self._open.id, self._index, 0, text, self._logprobs)
            self._logprobs = []

    def _begin(self, item: OutputMessage | OutputCall) -> Iterator[Event]:
        yield from self.close("completed")
        self._open = item
        self._response.output.append(item)
        yield OutputItemAdded(self._index, item)

    def close(self, status: str) -> Iterator[Event]:
        """End the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            (part,) = item.content
            part.logprobs += self._logprobs  # of tokens without text
            self._logprobs = []
            yield OutputTextDone(item.id, self._index, 0, part.text, part.logprobs)
            yield ContentPartDone(item.id, self._index, 0, part)
        else:
            yield CallArgumentsDone(item.id, self._index, item.name, item.arguments)
        yield OutputItemDone(self._index, item)


async def response_events(
    response: ResponseObject,
    source: AsyncGenerator[Chunk, None],
    keep: Callable[[ResponseObject], None],
) -> AsyncGenerator[Event, None]:
    """The events of a stream, from chunks of one choice; ``source`` is closed with it. ``keep`` is
    told of the response before the last event."""
    number = itertools.count()
    async with contextlib.aclosing(_events(response, source, keep)) as events:
        async for event in events:
            event.sequence_number = next(number)
            yield event


async def _events(
    response: ResponseObject,
    source: AsyncGenerator[Chunk, None],
    keep: Callable[[ResponseObject], None],
) -> AsyncGenerator[Event, None]:
    items = _Items(response)
    status = "completed"
    async with contextlib.aclosing(source):
        if response.background:
            yield ResponseCreated(response)
            yield ResponseQueued(response)
        async for chunk in source:
            for choice in chunk.choices:
                if choice.delta.role:
                    if not response.background:
                        yield ResponseCreated(response)
                    response.status = "in_progress"
                    yield ResponseInProgress(response)
                for event in items.add(choice):
                    yield event
                if choice.finish_reason == "length":
                    status = "incomplete"
            if isinstance(chunk.usage, Usage):
                for event in items.close(status):
                    yield event
                response.status = status
                response.usage = _usage(chunk.usage)
                if status == "incomplete":
                    response.incomplete_details = IncompleteDetails("max_output_tokens")
                else:
                    response.completed_at = int(time.time())
                keep(response)
                done = ResponseCompleted if status == "completed" else ResponseIncomplete
                yield done(response)


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.prompt_tokens_details
    return ResponseUsage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        InputDetails(details.cached_tokens, details.image_tokens),
        OutputDetails(),
        usage.internvl,
    )


async def response_of(events: AsyncGenerator[Event, None]) -> ResponseObject:
    """The whole response; ``events`` is closed."""
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, ResponseCompleted | ResponseIncomplete):
                return event.response
    raise EngineFailed("The engine could not finish this request.")


async def stream_of(
    response: ResponseObject,
    events: AsyncGenerator[Event, None],
    origins: Origins,
    keep: Callable[[ResponseObject], None],
) -> AsyncGenerator[bytes, None]:
    """The events as they are sent. An error behind the first one is one of them; a response in the
    background is kept then too."""
    last = -1
    try:
        with origins.named():
            async with contextlib.aclosing(events):
                async for event in events:
                    last = event.sequence_number
                    yield _framed(event)
    except Exception as error:
        if last < 0:
            raise
        for item in response.output:
            item.status = "incomplete" if item.status == "in_progress" else item.status
        end = _ended(response, known(error), last + 1)
        if response.background:
            keep(response)
        yield _framed(end)


_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def _ended(
    response: ResponseObject, error: ServiceError, number: int
) -> ResponseFailed | ResponseIncomplete:
    if response.background and isinstance(error, RequestAborted):
        response.status = "cancelled"  # for which OpenAI has no event of its own
        return ResponseIncomplete(response, number)
    code = _ERROR_CODES.get(error.status, "server_error")
    response.status, response.error = "failed", ResponseError(code, error.message)
    return ResponseFailed(response, number)


def _framed(event: Event) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (_TAGS[type(event)], msgspec.json.encode(event))


_TAGS = {kind: str(kind.__struct_config__.tag).encode() for kind in Event.__args__}


def last_words(error: ServiceError, number: int) -> bytes:
    """How a stream ends with an error that is not the response's: before its first event, or of who
    reads it."""
    return _framed(StreamError(error.code, error.message, error.param, number))
