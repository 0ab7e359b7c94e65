"""The answer to a chat request, whole and in chunks. They are msgspec structs, because a chunk is
written per token."""

import msgspec

from server.schemas.common import Logprobs, PromptLogprob, Usage


class FunctionDelta(msgspec.Struct, omit_defaults=True, gc=False):
    """More of a called function: its name, once, then the text of its arguments in pieces."""

    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, omit_defaults=True, gc=False):
    """More of one call; the first one of a call has everything but arguments."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: str | msgspec.UnsetType = msgspec.UNSET


class Box(msgspec.Struct, gc=False):
    """A place that the answer names: ``box`` as it was written, ``box_px`` in its picture's pixels.
    ``index`` counts the boxes of an answer: by it the official client puts lists together that
    arrive in pieces."""

    index: int
    label: str | None
    box: list[int | float]
    box_px: list[int] | None
    image_index: int | None


class Delta(msgspec.Struct, omit_defaults=True, gc=False):
    """What a chunk adds to the message."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET
    boxes: list[Box] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, gc=False):
    """The one choice that a chunk is about. ``stop_reason`` is the client's own stop string or
    token that ended it, ``token_ids`` what was generated since the last chunk of this choice, both
    as vLLM has them."""

    delta: Delta
    index: int = 0
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Candidate(msgspec.Struct):
    """One of the answers that best_of has compared. ``score`` is what its critic makes of it, the
    more the better; None: it could not be judged. ``logprob`` is the mean log-probability of its
    tokens, ``answer`` the final answer that it votes for, ``steps`` the scores of its steps."""

    index: int
    score: float | None
    finish_reason: str
    completion_tokens: int
    logprob: float | msgspec.UnsetType = msgspec.UNSET
    answer: str | msgspec.UnsetType | None = msgspec.UNSET
    steps: list[float] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET


class Comparison(msgspec.Struct):
    """How the answer was chosen: ``winner`` is the index of its candidate."""

    critic: str
    winner: int
    candidates: list[Candidate]


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    best_of: Comparison | msgspec.UnsetType = msgspec.UNSET


class FunctionAnswer(msgspec.Struct):
    """A called function; ``arguments`` is the text of a JSON object, unless it was cut off."""

    name: str
    arguments: str


class ToolCallAnswer(msgspec.Struct):
    """One call of a whole answer."""

    id: str
    function: FunctionAnswer
    type: str = "function"


class AnswerMessage(msgspec.Struct):
    """The message of a whole answer."""

    content: str | None
    tool_calls: list[ToolCallAnswer] | msgspec.UnsetType = msgspec.UNSET
    boxes: list[Box] | msgspec.UnsetType = msgspec.UNSET
    role: str = "assistant"
    refusal: None = None


class Choice(msgspec.Struct):
    """One choice of a whole answer."""

    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: Logprobs | None = None
    stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct):
    """A whole answer."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    best_of: Comparison | msgspec.UnsetType = msgspec.UNSET
