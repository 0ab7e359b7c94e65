"""Anthropic's Messages API: its request as a chat request, and chunks as its events. The answer
without streaming is a fold over the same events."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
from pydantic_core import from_json

from server.chat.prepare import PreparedChat
from server.dialects.draft import Draft, Origins
from server.errors import anthropic_envelope
from server.files import as_url
from server.schemas.answer import Chunk, ChunkChoice, Delta
from server.schemas.chat import ChatRequest
from server.schemas.common import Usage
from server.schemas.message import (
    AnswerText,
    AnswerToolUse,
    AnthropicMessage,
    AnthropicUsage,
    BlockDelta,
    BlockStart,
    BlockStop,
    Event,
    InputDelta,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    StopDelta,
    TextDelta,
)
from server.schemas.messages import (
    AssistantMessage,
    ClientTool,
    CountRequest,
    ImageBlock,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from wire.errors import EngineFailed, ServiceError

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_NAMES = {
    "continue_final_message": "messages",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "stop": "stop_sequences",
}


class _Chat(ChatRequest):
    # max_tokens must be there: a limit rather than a wish.
    shortens = True


def as_chat(request: CountRequest) -> tuple[ChatRequest, Origins]:
    """The chat request that a request asks, and where its fields come from. Raises
    InvalidRequest."""
    draft = Draft(request, _NAMES)
    if request.system:
        draft.message("system", "system")
        for number, block in enumerate(request.system):
            draft.text(block.text, f"system[{number}]")
    for number, message in enumerate(request.messages):
        where = f"messages[{number}]"
        if isinstance(message, UserMessage):
            _user(draft, message, where)
        else:
            _other(draft, message, where)
    if draft.last_role == "assistant":  # the answer goes on in it
        draft.fields["continue_final_message"] = True
        draft.origins.add("continue_final_message", where)
    _tools(draft, request)
    config = request.output_config
    if config is not None and config.format is not None:
        schema = {"name": "output", "schema": config.format.definition, "strict": True}
        draft.fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    draft.fields["stop"] = request.stop_sequences
    draft.fields["visual_budget"] = request.visual_budget
    draft.fields["preprocess"] = request.preprocess
    draft.fields["v2pe_delta"] = request.v2pe_delta
    return draft.finish(_Chat), draft.origins


def _user(draft: Draft, message: UserMessage, where: str) -> None:
    """Results first, in the order of their calls: they have no other mark in the prompt."""
    results, others = [], []
    for number, block in enumerate(message.content):
        here = f"{where}.content[{number}]"
        if isinstance(block, ToolResultBlock):
            place = draft.place(block.tool_use_id, f"{here}.tool_use_id")
            results.append((place, number, block))
        else:
            others.append((block, here))
    for _, number, result in sorted(results, key=lambda one: one[:2]):
        here = f"{where}.content[{number}]"
        draft.message("tool", here)
        for index, shown in enumerate(result.content or ()):
            _show(draft, shown, f"{here}.content[{index}]")
    if others or not results:
        draft.message("user", where)
    for block, here in others:
        _show(draft, block, here)


def _other(draft: Draft, message: AssistantMessage | SystemMessage, where: str) -> None:
    draft.message(message.role, where)
    for number, block in enumerate(message.content):
        here = f"{where}.content[{number}]"
        if isinstance(block, ToolUseBlock):
            draft.call(block.id, block.name, block.input, here, "input")
        elif not isinstance(block, ThinkingBlock):
            draft.text(block.text, f"{here}.text")


def _show(draft: Draft, block: TextBlock | ImageBlock, where: str) -> None:
    if isinstance(block, TextBlock):
        draft.text(block.text, f"{where}.text")
        return
    source = block.source
    if source.type == "url":
        draft.picture(source.url, where, f"{where}.source.url", block)
    elif source.type == "file":
        draft.picture(as_url(source.file_id), where, f"{where}.source.file_id", block)
    else:
        url = f"data:{source.media_type};base64,{source.data}"
        draft.picture(url, where, f"{where}.source.data", block)


def _tools(draft: Draft, request: CountRequest) -> None:
    if request.tools is not None:
        draft.fields["tools"] = [
            {"type": "function", "function": _function(tool)} for tool in request.tools
        ]
    for number in range(len(request.tools or ())):
        path = f"tools[{number}].function"
        draft.origins.add(path, f"tools[{number}]")
        draft.origins.add(f"{path}.parameters", f"tools[{number}].input_schema")
    choice = request.tool_choice
    if choice is None:
        return
    named = {"type": "function", "function": {"name": choice.name}}
    draft.fields["tool_choice"] = _CHOICES.get(choice.type, named)
    if choice.disable_parallel_tool_use:
        draft.fields["parallel_tool_calls"] = False


def _function(tool: ClientTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    for name in ("description", "strict"):
        if getattr(tool, name) is not None:
            function[name] = getattr(tool, name)
    return function


@dataclasses.dataclass
class _Blocks:
    """The blocks of an answer on its way; one is open at a time."""

    index: int = -1
    open: str = ""
    called: bool = False

    def add(self, delta: Delta) -> Iterator[Event]:
        """What a delta makes of them."""
        if isinstance(delta.content, str) and delta.content:
            if self.open != "text":
                yield from self._begin("text", AnswerText(""))
            yield BlockDelta(self.index, TextDelta(delta.content))
        for call in delta.tool_calls or ():
            if isinstance(call.id, str) and isinstance(call.function.name, str):
                identity = call.id.replace("call_", "toolu_", 1)
                yield from self._begin("tool_use", AnswerToolUse(identity, call.function.name, {}))
                self.called = True
            if call.function.arguments:
                yield BlockDelta(self.index, InputDelta(call.function.arguments))

    def _begin(self, kind: str, block: AnswerText | AnswerToolUse) -> Iterator[Event]:
        yield from self.close()
        self.index, self.open = self.index + 1, kind
        yield BlockStart(self.index, block)

    def close(self) -> Iterator[Event]:
        """End the open block, if there is one."""
        if self.open:
            self.open = ""
            yield BlockStop(self.index)


async def message_events(
    chat: PreparedChat, source: AsyncGenerator[Chunk, None]
) -> AsyncGenerator[Event, None]:
    """The events of a stream, from chunks of one choice. ``source`` is closed with it."""
    blocks = _Blocks()
    stop = StopDelta(None, None)
    async with contextlib.aclosing(source):
        async for chunk in source:
            for choice in chunk.choices:
                if choice.delta.role:
                    usage = _usage(chat.meter.usage(len(chat.engine.prompt), 0))
                    yield MessageStart(
                        AnthropicMessage(chunk.id, chunk.model, [], None, None, usage)
                    )
                    yield Ping()
                for event in blocks.add(choice.delta):
                    yield event
                if choice.finish_reason is not None:
                    stop = _stop(chat, choice, called=blocks.called)
            if isinstance(chunk.usage, Usage):
                for event in blocks.close():
                    yield event
                yield MessageDelta(stop, _usage(chunk.usage))
                yield MessageStop()


def _stop(chat: PreparedChat, choice: ChunkChoice, *, called: bool) -> StopDelta:
    if isinstance(choice.stop_reason, str):
        return StopDelta("stop_sequence", choice.stop_reason)
    if choice.finish_reason == "length":
        longest = len(chat.engine.prompt) + chat.engine.sampling.max_tokens
        is_full = longest >= chat.model.ready.max_model_len
        return StopDelta("model_context_window_exceeded" if is_full else "max_tokens", None)
    return StopDelta("tool_use" if called else "end_turn", None)


def _usage(usage: Usage) -> AnthropicUsage:
    """Anthropic counts what was found in the cache apart."""
    cached = usage.prompt_tokens_details.cached_tokens
    return AnthropicUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)


async def message_of(events: AsyncGenerator[Event, None]) -> AnthropicMessage:
    """The whole answer; ``events`` is closed."""
    message: AnthropicMessage | None = None
    texts: list[str] = []
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, MessageStart):
                message = event.message
            elif message is None:
                continue
            elif isinstance(event, BlockStart):
                message.content.append(event.content_block)
                texts = []
            elif isinstance(event, BlockDelta):
                delta = event.delta
                texts.append(delta.text if isinstance(delta, TextDelta) else delta.partial_json)
            elif isinstance(event, BlockStop):
                _fill(message.content[event.index], "".join(texts))
            elif isinstance(event, MessageDelta):
                message.stop_reason = event.delta.stop_reason
                message.stop_sequence = event.delta.stop_sequence
                message.usage = event.usage
    if message is None or message.stop_reason is None:
        raise EngineFailed("The engine could not finish this request.")
    return message


def _fill(block: AnswerText | AnswerToolUse, text: str) -> None:
    if isinstance(block, AnswerText):
        block.text = text
        return
    # Cut off at the length it is the beginning of an object: Anthropic's client reads it so too.
    with contextlib.suppress(ValueError):
        found = from_json(text, allow_partial=True)
        block.input = found if isinstance(found, dict) else {}


def frame(event: Event) -> bytes:
    """An event as it is sent."""
    return b"event: %s\ndata: %s\n\n" % (_TAGS[type(event)], msgspec.json.encode(event))


_TAGS = {kind: str(kind.__struct_config__.tag).encode() for kind in Event.__args__}


def last_words(error: ServiceError, _: int) -> bytes:
    """How a stream ends with an error."""
    return b"event: error\ndata: " + anthropic_envelope(error) + b"\n\n"
