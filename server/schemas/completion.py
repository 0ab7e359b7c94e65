"""The completions request, field by field, and its answer. Whole or in chunks, the answer has one
shape."""

import dataclasses
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import Field, PlainValidator, WithJsonSchema

from server.schemas.common import PromptLogprob, Usage
from server.schemas.form import wrong
from server.schemas.generation import Generation
from wire.sampling import MAX_LOGPROBS

# Answers of one request: prompts times choices.
MAX_TEXTS = 128
_LARGEST = 2**31 - 1  # no vocabulary has as many tokens


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """A text, or the ids of its tokens, and the path of the field that holds it."""

    where: str
    content: str | list[int]


def _prompts(value: object) -> list[TextPrompt]:
    """What OpenAI allows: a text, token ids, or an array of either."""
    if isinstance(value, str):
        return [TextPrompt("prompt", value)]
    if not isinstance(value, list):
        raise wrong("must be a string, an array of strings, or an array of token ids")
    if not value:
        raise wrong("must not be empty")
    if isinstance(value[0], int):
        _check_ids(value, "")
        return [TextPrompt("prompt", value)]
    if len(value) > MAX_TEXTS:
        raise wrong(f"must not have more than {MAX_TEXTS} entries")
    for number, prompt in enumerate(value):
        if isinstance(prompt, list):
            _check_ids(prompt, f"[{number}]")
        elif not isinstance(prompt, str):
            raise wrong("must be a string or an array of token ids", f"[{number}]")
    return [TextPrompt(f"prompt[{number}]", prompt) for number, prompt in enumerate(value)]


def _check_ids(ids: list[object], where: str) -> None:
    if not ids:
        raise wrong("must not be empty", where)
    for number, token in enumerate(ids):
        if type(token) is not int or not 0 <= token <= _LARGEST:
            raise wrong("must be a token id", f"{where}[{number}]")


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_SHAPES: list[dict[str, Any]] = [
    {"type": "string"},
    _IDS,
    {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, _IDS]},
        "minItems": 1,
        "maxItems": MAX_TEXTS,
    },
]


class CompletionRequest(Generation):
    """POST /v1/completions: the fields that have an effect."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = Generation.refused | {
        "best_of": (1,),  # OpenAI's, which has a number only
        "prompt_embeds": (),
        "suffix": ("",),
    }
    prompt_field = "prompt"
    usual_length = 16  # as OpenAI has it

    prompt: Annotated[
        list[TextPrompt], PlainValidator(_prompts), WithJsonSchema({"anyOf": _SHAPES})
    ]
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    # vLLM's and llama.cpp's extensions
    add_special_tokens: bool | None = None
    parse_special: bool | None = None

    @property
    def likeliest(self) -> int:
        """See ``Generation``."""
        return -1 if self.logprobs is None else self.logprobs

    @property
    def prompt_likeliest(self) -> int:
        """See ``Generation``. A prompt that is repeated has what its answer has."""
        return max(super().prompt_likeliest, self.likeliest if self.echo else -1)


class TextLogprobs(msgspec.Struct):
    """Of each token, in order. ``text_offset`` says where in the text it begins, in characters.
    The first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One answer, or more of it. ``stop_reason`` is the client's own stop string or token that
    ended it, ``token_ids`` what was generated since the last event of this choice, both as vLLM has
    them."""

    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(msgspec.Struct):
    """A whole answer, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"
