"""The answer of Anthropic's Messages API, whole and as events. They are msgspec structs, because an
event is written per token; a test checks them against the official client's models."""

from typing import Any

import msgspec


class AnswerText(msgspec.Struct, tag="text"):
    """A block of text."""

    text: str
    citations: None = None


class AnswerToolUse(msgspec.Struct, tag="tool_use"):
    """A call. While it is streamed, ``input`` is empty."""

    id: str
    name: str
    input: dict[str, Any]


class AnthropicUsage(msgspec.Struct):
    """Tokens of one request; those found in the cache are no input tokens here."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnthropicMessage(msgspec.Struct, tag="message"):
    """A whole answer, or its beginning."""

    id: str
    model: str
    content: list[AnswerText | AnswerToolUse]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage
    role: str = "assistant"


class MessageStart(msgspec.Struct, tag="message_start"):
    """The answer begins."""

    message: AnthropicMessage


class Ping(msgspec.Struct, tag="ping"):
    """The connection is open."""


class BlockStart(msgspec.Struct, tag="content_block_start"):
    """A block begins, empty."""

    index: int
    content_block: AnswerText | AnswerToolUse


class TextDelta(msgspec.Struct, tag="text_delta", gc=False):
    """More text."""

    text: str


class InputDelta(msgspec.Struct, tag="input_json_delta", gc=False):
    """More of the text of a call's input."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag="content_block_delta", gc=False):
    """More of a block."""

    index: int
    delta: TextDelta | InputDelta


class BlockStop(msgspec.Struct, tag="content_block_stop"):
    """A block is over."""

    index: int


class StopDelta(msgspec.Struct):
    """Why the answer is over, and the client's own sequence if one ended it."""

    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag="message_delta"):
    """The answer is over."""

    delta: StopDelta
    usage: AnthropicUsage


class MessageStop(msgspec.Struct, tag="message_stop"):
    """Nothing follows."""


Event = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class TokenCount(msgspec.Struct):
    """/v1/messages/count_tokens."""

    input_tokens: int
