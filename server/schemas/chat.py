"""The chat request, field by field."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from server.schemas.form import Form, OrText, clip, clip_name, one_of, wrong
from server.schemas.generation import MAX_CHOICES, Generation
from wire.positions import STEPS
from wire.sampling import MAX_LOGPROBS

MAX_MESSAGES = 2048
MAX_PARTS = 1024
MAX_TOOLS = 128

PART_TYPES = {
    "system": ("text",),
    "developer": ("text",),
    "user": ("text", "image_url", "video_url", "file"),
    "assistant": ("text", "refusal"),
    "tool": ("text", "image_url", "file"),
}


class _Part(Form):
    """Hints to caches and ids of media mean nothing: what is cached is known by its content."""

    ignored = frozenset({"cache_control", "prompt_cache_breakpoint", "uuid"})


class TextPart(_Part):
    """Text."""

    type: Literal["text"]
    text: str


class RefusalPart(_Part):
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


class Bounds(Form):
    """How much of the prompt a picture, or each frame of a video, may take."""

    min_tiles: int | None = Field(None, ge=1)
    max_tiles: int | None = Field(None, ge=1)
    fit: bool | None = None
    preprocess: Literal["normalized", "reference"] | None = None


class ImageUrl(Bounds):
    """A data:, http:, https: or file: URL, or a file's id. ``detail`` "low" means one tile."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(Bounds):
    """A URL or a file's id, or those of pictures; ``start`` and ``end`` in seconds."""

    url: str | None = Field(None, min_length=1)
    frames: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    num_frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    start: float | None = Field(None, ge=0, le=1e9, allow_inf_nan=False)
    end: float | None = Field(None, gt=0, le=1e9, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_source(self) -> "VideoUrl":
        if (self.url is None) == (self.frames is None):
            raise wrong("must have either 'url' or 'frames'")
        if self.frames is not None and (self.fps, self.start, self.end) != (None, None, None):
            raise wrong("has 'frames', which have no time: leave out 'fps', 'start' and 'end'")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise wrong("must be less than 'end'", "start")
        return self


class ImagePart(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_url_object), OrText()]


class VideoPart(_Part):
    """A video."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_url_object), OrText()]


class FileReference(Bounds):
    """A file that was uploaded. ``detail`` "low" means one tile of a picture."""

    ignored = frozenset({"filename"})

    file_id: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    file_data: None = None


class FilePart(_Part):
    """A picture or a video, whichever the file is."""

    type: Literal["file"]
    file: FileReference


def _kind(value: object) -> str:
    return f"<{value['type']}>" if isinstance(value, dict) else "<text>"


def _check_part(value: object) -> object:
    if not isinstance(value, dict):
        raise wrong("must be an object with a 'type'")
    kind = value.get("type")
    if kind not in ("text", "image_url", "video_url", "file", "refusal"):
        found = clip(kind) if "type" in value else "missing"
        supported = "'text', 'image_url', 'video_url' and 'file'"
        raise wrong(f"is {found}; supported are {supported}", "type")
    return value


# Tags are in angle brackets so that they can be told from field names in an error's path.
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[VideoPart, Tag("<video_url>")]
    | Annotated[FilePart, Tag("<file>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_kind),
    BeforeValidator(_check_part),
]


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise wrong("must be a string or an array of parts")


Content = Annotated[list[Part], Field(max_length=MAX_PARTS), BeforeValidator(_parts), OrText()]


class FunctionCall(Form):
    """``arguments`` is the text of a JSON object."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str = "{}"


class ToolCallMessage(Form):
    """A call that the assistant made in an earlier turn."""

    ignored = frozenset({"index"})

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Form):
    """One message of any role."""

    # Names and numbers, and what answers hold, or clients add to them, that come back as messages.
    ignored = frozenset(
        {
            *("name", "tool_call_id", "refusal", "annotations", "boxes"),
            *("reasoning", "reasoning_content", "thinking_blocks", "provider_specific_fields"),
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(max_length=MAX_TOOLS)] | None = None
    # The older and the spoken form of an assistant's turn: refused unless null.
    function_call: None = None
    audio: None = None


class FunctionDefinition(Form):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Form):
    """A tool the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


_MODES = ("auto", "none", "required")


class ToolChoice(Form):
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
            raise wrong("must have a 'mode', 'auto' or 'required', and 'tools'", "allowed_tools")
        names = [_function_name(tool) for tool in tools]
        return ToolChoice.model_validate({"mode": mode, "names": names})
    raise wrong(
        f"is {clip(kind)}; supported are 'auto', 'none', 'required', and objects of the type "
        "'function' or 'allowed_tools'"
    )


def _function_name(value: object) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong("must name a function in 'function.name'")
    return name


_Choice = Annotated[
    ToolChoice | None,
    BeforeValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": [*_MODES, None]}, {"type": "object"}]}),
]


class VisualBudget(Form):
    """What all pictures and videos of a request may take together: one of the two."""

    max_tiles: int | None = Field(None, ge=1, le=2**31 - 1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _one_measure(self) -> "VisualBudget":
        if (self.max_tiles is None) == (self.max_tokens is None):
            raise wrong("must have either 'max_tiles' or 'max_tokens'")
        return self


_TEMPLATE = ("add_generation_prompt", "continue_final_message", "enable_thinking", "thinking")


def _template_kwargs(value: object) -> object:
    """There is no template that could know others."""
    for name in value if isinstance(value, dict) else ():
        if name not in _TEMPLATE:
            raise wrong("is not supported; leave it out", f"{clip_name(str(name))}")
    return value


def _no_thinking(value: object) -> object:
    if value is True:
        raise wrong("must be false: the model has no such mode")
    return value


NoThinking = Annotated[bool | None, BeforeValidator(_no_thinking)]


class TemplateKwargs(Form):
    """What other servers hand to a chat template, as far as a prompt has it here. Fields of the
    request itself win."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    enable_thinking: NoThinking = None
    thinking: NoThinking = None


def _delta(value: object) -> object:
    if value == "auto" or (type(value) in (int, float) and value in STEPS):
        return value
    raise wrong(f"must be 'auto' or one of {', '.join(f'{step:g}' for step in STEPS)}")


Delta = Annotated[
    float | Literal["auto"],
    BeforeValidator(_delta),
    WithJsonSchema({"enum": ["auto", *STEPS]}),
]


class BestOf(Form):
    """How many answers to draw, and who chooses the one that is returned. ``return_texts`` asks for
    those of all, and ``return_scores``, if not false, for what the critic says of them."""

    n: int = Field(ge=1, le=MAX_CHOICES)
    critic: Annotated[
        Literal["logprob", "vote", "visualprm"],
        BeforeValidator(lambda value: "logprob" if value is None else value),
    ] = "logprob"
    return_scores: bool | None = None
    return_texts: bool | None = None


def _best_of(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 1:
            return None
        raise wrong("must be an object with 'n' and 'critic', or 1")
    return value


class Prediction(Form):
    """What much of the answer is expected to be."""

    type: Literal["content"]
    content: Annotated[
        list[Annotated[TextPart, BeforeValidator(one_of("text"))]],
        Field(max_length=MAX_PARTS),
        BeforeValidator(_parts),
        OrText(),
    ]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """POST /v1/chat/completions: the fields that have an effect."""

    ignored = Generation.ignored | {
        "metadata",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "verbosity",
        # vLLM and SGLang: the model has no thoughts of its own to show or to limit
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
        "thinking_token_budget",
    }
    refused: ClassVar[dict[str, tuple[Any, ...]]] = Generation.refused | {
        # OpenAI
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "web_search_options": (),
        # vLLM
        "add_special_tokens": (False,),
        "chat_template": (),
        "documents": ([],),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        # SGLang and LMDeploy
        "enable_thinking": (False,),
        "images_config": ({},),
        "max_dynamic_patch": (),
        "min_dynamic_patch": (),
        "video_config": ({},),
    }
    prompt_field = "messages"

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: _Choice = None
    parallel_tool_calls: bool | None = None
    prediction: Annotated[Prediction, BeforeValidator(one_of("content"))] | None = None
    # vLLM's extensions
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[TemplateKwargs | None, BeforeValidator(_template_kwargs)] = None
    # Our own
    visual_budget: VisualBudget | None = None
    preprocess: Literal["normalized", "reference"] | None = None
    v2pe_delta: Delta | None = None
    best_of: Annotated[BestOf | None, BeforeValidator(_best_of)] = None

    @model_validator(mode="after")
    def _one_of_many(self) -> "ChatRequest":
        if self.best_of is None:
            return self
        if (self.n or 1) > 1:
            raise wrong("must be 1 or left out with best_of, of which one answer is returned", "n")
        if self.best_of.n > 1:
            same = "all the answers of best_of would be the same"
            if self.temperature == 0:
                raise wrong(f"must be above 0: {same}", "temperature")
            if self.top_k == 1:
                raise wrong(f"must not be 1: {same}", "top_k")
        return self

    @model_validator(mode="after")
    def _likeliest_of_something(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise wrong("needs logprobs to be true", "top_logprobs")
        return self

    @property
    def asks(self) -> bool | None:
        """Whether the prompt shall end with the beginning of an answer."""
        return self._of_template("add_generation_prompt")

    @property
    def continues(self) -> bool:
        """Whether the answer goes on in the last message."""
        return bool(self._of_template("continue_final_message"))

    def _of_template(self, name: str) -> bool | None:
        own: bool | None = getattr(self, name)
        return getattr(self.chat_template_kwargs, name, None) if own is None else own

    @property
    def choices(self) -> int:
        """See ``Generation``."""
        return super().choices if self.best_of is None else self.best_of.n

    @property
    def length(self) -> tuple[str, int | None]:
        """See ``Generation``."""
        if self.max_completion_tokens:
            return "max_completion_tokens", self.max_completion_tokens
        return super().length

    @property
    def likeliest(self) -> int:
        """See ``Generation``."""
        return (self.top_logprobs or 0) if self.logprobs else -1
