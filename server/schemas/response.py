"""The answer of OpenAI's Responses API, whole and as events. They are msgspec structs, because an
event is written per token; a test checks them against the official client's models."""

from typing import Any

import msgspec

from server.schemas.common import MediaUsage, TokenLogprob


class OutputText(msgspec.Struct, tag="output_text"):
    """Text of an answer."""

    text: str
    annotations: list[None]
    logprobs: list[TokenLogprob]


class OutputMessage(msgspec.Struct, tag="message"):
    """A message of the model's."""

    id: str
    content: list[OutputText]
    status: str = "in_progress"
    role: str = "assistant"


class OutputCall(msgspec.Struct, tag="function_call"):
    """A call; ``arguments`` is the text of a JSON object, unless it was cut off."""

    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


class InputDetails(msgspec.Struct):
    """``cached_tokens`` were not computed again; ``image_tokens`` stand for pictures."""

    cached_tokens: int
    image_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """Of the tokens of an answer."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Tokens of one response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails
    internvl: MediaUsage | msgspec.UnsetType = msgspec.UNSET


class ResponseError(msgspec.Struct):
    """Why a response failed behind its first byte."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response is not complete."""

    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, on its way or over. The fields of the request are told as they were sent, or as
    what they are where nothing was sent."""

    id: str
    created_at: int
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    status: str = "in_progress"
    output: list[OutputMessage | OutputCall] = msgspec.field(default_factory=list)
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    completed_at: int | None = None
    background: bool = False
    truncation: str = "disabled"
    object: str = "response"


class _OfResponse(msgspec.Struct):
    response: ResponseObject
    sequence_number: int = 0


class ResponseCreated(_OfResponse, tag="response.created"):
    """The response begins."""


class ResponseQueued(_OfResponse, tag="response.queued"):
    """The response waits, in the background."""


class ResponseInProgress(_OfResponse, tag="response.in_progress"):
    """Work has begun."""


class ResponseCompleted(_OfResponse, tag="response.completed"):
    """The response is whole."""


class ResponseIncomplete(_OfResponse, tag="response.incomplete"):
    """The response was cut off, at its length or because it was cancelled."""


class ResponseFailed(_OfResponse, tag="response.failed"):
    """The response failed."""


class OutputItemAdded(msgspec.Struct, tag="response.output_item.added"):
    """An item begins, empty."""

    output_index: int
    item: OutputMessage | OutputCall
    sequence_number: int = 0


class OutputItemDone(msgspec.Struct, tag="response.output_item.done"):
    """An item is over."""

    output_index: int
    item: OutputMessage | OutputCall
    sequence_number: int = 0


class _OfText(msgspec.Struct):
    item_id: str
    output_index: int
    content_index: int


class ContentPartAdded(_OfText, tag="response.content_part.added"):
    """The text of a message begins, empty."""

    part: OutputText
    sequence_number: int = 0


class ContentPartDone(_OfText, tag="response.content_part.done"):
    """The text of a message is over."""

    part: OutputText
    sequence_number: int = 0


class OutputTextDelta(_OfText, tag="response.output_text.delta", gc=False):
    """More text, and the tokens that are new."""

    delta: str
    logprobs: list[TokenLogprob]
    sequence_number: int = 0


class OutputTextDone(_OfText, tag="response.output_text.done"):
    """The whole text."""

    text: str
    logprobs: list[TokenLogprob]
    sequence_number: int = 0


class CallArgumentsDelta(msgspec.Struct, tag="response.function_call_arguments.delta", gc=False):
    """More of the text of a call's arguments."""

    item_id: str
    output_index: int
    delta: str
    sequence_number: int = 0


class CallArgumentsDone(msgspec.Struct, tag="response.function_call_arguments.done"):
    """The whole text of a call's arguments."""

    item_id: str
    output_index: int
    name: str
    arguments: str
    sequence_number: int = 0


class StreamError(msgspec.Struct, tag="error"):
    """The stream failed before the response began, or is read no further."""

    code: str
    message: str
    param: str | None
    sequence_number: int


Event = (
    ResponseCreated
    | ResponseQueued
    | ResponseInProgress
    | OutputItemAdded
    | ContentPartAdded
    | OutputTextDelta
    | OutputTextDone
    | ContentPartDone
    | CallArgumentsDelta
    | CallArgumentsDone
    | OutputItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | StreamError
)


class InputTokens(msgspec.Struct):
    """/v1/responses/input_tokens."""

    input_tokens: int
    object: str = "response.input_tokens"


class ResponseDeleted(msgspec.Struct):
    """DELETE /v1/responses/{id}."""

    id: str
    object: str = "response"
    deleted: bool = True


class InputItems(msgspec.Struct):
    """GET /v1/responses/{id}/input_items: a page of them."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"
