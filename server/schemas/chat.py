"""The chat request, field by field. Every field of the OpenAI API is either in
``ChatRequest``, in ``IGNORED`` or in ``REFUSED``; a test holds the three against the official
client, and docs/api.md against the three. Incoming JSON is validated by pydantic, strictly.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wire.sampling import MAX_LOGPROBS, MAX_SEED

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOOLS = 128
MAX_CHOICES = 16
MAX_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 64
MAX_LABELS = 64
MAX_LABEL_LENGTH = 128
MAX_BOXES = 100
# Log-probabilities that one answer reports of its prompt: tokens times (1 + the likeliest of each).
MAX_PROMPT_LOGPROBS = 32768

# Fields that change neither the answer nor its form here: bookkeeping, hints, and knobs of
# features that this model family does not have.
IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

# Fields that would change the answer and are not implemented -> values that ask for nothing.
# null always asks for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "length_penalty": (1,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

PART_TYPES = {
    "system": ("text",),
    "developer": ("text",),
    "user": ("text", "image_url", "video_url"),
    "assistant": ("text", "refusal"),
    "tool": ("text",),
}


class _Model(BaseModel):
    # Unknown fields are ignored; values are taken as they are, "1" is no number.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _wrong(message: str, field: str = "") -> PydanticCustomError:
    """An error whose message is written for the client; ``field`` is appended to its path."""
    return PydanticCustomError("client", "{message}", {"message": message, "field": field})


def clip(value: object) -> str:
    """A client's own value, short enough to be repeated in a message."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:60] + "…")


class TextPart(_Model):
    """Text."""

    type: Literal["text"]
    text: str


class RefusalPart(_Model):
    """Something an assistant declined to do; rendered as its text."""

    type: Literal["refusal"]
    refusal: str


# Names that other servers have for what a part may ask.
_ELSEWHERE = {
    "max_dynamic_patch": "max_tiles",
    "min_dynamic_patch": "min_tiles",
    "max_frames": "num_frames",
}


def _url_object(value: object) -> object:
    if isinstance(value, str):
        return {"url": value}
    if isinstance(value, dict) and not _ELSEWHERE.keys().isdisjoint(value):
        return {_ELSEWHERE.get(name, name): each for name, each in value.items()}
    return value


class _Bounds(_Model):
    """How much of the prompt a picture, or each frame of a video, may take."""

    min_tiles: int | None = Field(None, ge=1)
    max_tiles: int | None = Field(None, ge=1)
    fit: bool | None = None
    preprocess: Literal["normalized", "reference"] | None = None


class ImageUrl(_Bounds):
    """A data:, http:, https: or file: URL. ``detail`` "low" means one tile."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(_Bounds):
    """A URL, or the URLs of pictures; ``start`` and ``end`` in seconds."""

    url: str | None = Field(None, min_length=1)
    frames: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    num_frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    start: float | None = Field(None, ge=0, le=1e9, allow_inf_nan=False)
    end: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_source(self) -> "VideoUrl":
        if (self.url is None) == (self.frames is None):
            raise _wrong("must have either 'url' or 'frames'")
        if self.frames is not None and (self.fps, self.start, self.end) != (None, None, None):
            raise _wrong("has 'frames', which have no time: leave out 'fps', 'start' and 'end'")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise _wrong("must be less than 'end'", "start")
        return self


class ImagePart(_Model):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_url_object)]


class VideoPart(_Model):
    """A video."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_url_object)]


def _kind(value: object) -> str:
    return f"<{value['type']}>" if isinstance(value, dict) else "<text>"


def _check_part(value: object) -> object:
    if not isinstance(value, dict):
        raise _wrong("must be an object with a 'type'")
    kind = value.get("type")
    if kind not in ("text", "image_url", "video_url", "refusal"):
        found = clip(kind) if "type" in value else "missing"
        raise _wrong(f"is {found}; supported are 'text', 'image_url' and 'video_url'", "type")
    return value


# Tags are in angle brackets so that they can be told from field names in an error's path.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_kind),
    BeforeValidator(_check_part),
]


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise _wrong("must be a string or an array of parts")


Content = Annotated[list[Part], Field(max_length=MAX_PARTS), BeforeValidator(_parts)]


class FunctionCall(_Model):
    """``arguments`` is the text of a JSON object."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str = "{}"


class ToolCallMessage(_Model):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Model):
    """One message of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(max_length=MAX_TOOLS)] | None = None
    # The older and the spoken form of an assistant's turn: refused unless null.
    function_call: None = None
    audio: None = None


class FunctionDefinition(_Model):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A tool the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class StreamOptions(_Model):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool | None = None


def _stops(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKEN_IDS)]


def _biases(value: object) -> object:
    """JSON has no integer keys: token ids come as strings."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise _wrong(f"has the key {clip(key)}; keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
    Field(max_length=MAX_TOKEN_IDS),
]


_MODES = ("auto", "none", "required")


class ToolChoice(_Model):
    """Whether tools may or must be called; ``names`` are those that may be, None for all. With
    ``single`` one function was named: it is called once."""

    mode: Literal["auto", "none", "required"]
    names: list[str] | None = None
    single: bool = False


def _tool_choice(value: object) -> object:
    if value is None:
        return None
    if value in _MODES:
        return ToolChoice.model_validate({"mode": value})
    kind = value.get("type") if isinstance(value, dict) else value
    if isinstance(value, dict) and kind == "function":
        return ToolChoice(mode="required", names=[_function_name(value)], single=True)
    if isinstance(value, dict) and kind == "allowed_tools":
        allowed = value.get("allowed_tools")
        given = allowed if isinstance(allowed, dict) else {}
        mode, tools = given.get("mode"), given.get("tools")
        if not isinstance(tools, list) or mode not in ("auto", "required"):
            raise _wrong("must have a 'mode', 'auto' or 'required', and 'tools'", "allowed_tools")
        names = [_function_name(tool) for tool in tools]
        return ToolChoice.model_validate({"mode": mode, "names": names})
    raise _wrong(
        f"is {clip(kind)}; supported are 'auto', 'none', 'required', and objects of the type "
        "'function' or 'allowed_tools'"
    )


def _function_name(value: object) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _wrong("must name a function in 'function.name'")
    return name


_Choice = Annotated[
    ToolChoice | None,
    BeforeValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": [*_MODES, None]}, {"type": "object"}]}),
]


def _schema(value: object) -> object:
    """A JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise _wrong("must be a JSON schema") from None
    return value


def _schema_name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch("[a-zA-Z0-9_-]{1,64}", value):
        raise _wrong("must be 1 to 64 letters, digits, '_' or '-'")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema)]
ChoiceTexts = list[str]


class JsonSchemaFormat(_Model):
    """With ``strict``, a schema that cannot be enforced whole is refused."""

    name: Annotated[str, BeforeValidator(_schema_name)]
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def _label(value: object) -> object:
    if isinstance(value, str) and value != value.strip():
        raise _wrong("must not begin or end with a blank")
    return value


Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH), BeforeValidator(_label)]


class BoxesFormat(_Model):
    """The labels that boxes may have, how many there may be, and which picture they are in."""

    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)] | None = None
    max_boxes: int | None = Field(None, ge=1, le=MAX_BOXES)
    image_index: int | None = Field(None, ge=0)


class ResponseFormat(_Model):
    """OpenAI's way to say what an answer must look like; boxes are our own extension."""

    type: Literal["text", "json_object", "json_schema", "internvl_boxes"]
    json_schema: JsonSchemaFormat | None = None
    internvl_boxes: BoxesFormat | None = None


class StructuredOutputs(_Model):
    """vLLM's way: one of the five. What would change their meaning is refused."""

    definition: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None


class VisualBudget(_Model):
    """What all pictures and videos of a request may take together: one of the two."""

    max_tiles: int | None = Field(None, ge=1, le=2**31 - 1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _one_measure(self) -> "VisualBudget":
        if (self.max_tiles is None) == (self.max_tokens is None):
            raise _wrong("must have either 'max_tiles' or 'max_tokens'")
        return self


class ChatRequest(_Model):
    """POST /v1/chat/completions: the fields that have an effect."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[Biases | None, BeforeValidator(_biases)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Annotated[
        Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_stops)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: _Choice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # vLLM's extensions
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, allow_inf_nan=False)
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    ignore_eos: bool | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: str | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    skip_special_tokens: bool | None = None
    # Our own
    visual_budget: VisualBudget | None = None
    preprocess: Literal["normalized", "reference"] | None = None
