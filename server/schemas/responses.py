"""The request of OpenAI's Responses API, field by field. What it has in common with every request
for text (``Generation``) holds here too, under the same names."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from server.schemas.chat import MAX_PARTS, MAX_TOOLS, Bounds, Delta, VisualBudget
from server.schemas.form import Form, OrText, clip, one_of, tag_of, wrong
from server.schemas.generation import Generation, JsonSchemaFormat
from wire.sampling import MAX_LOGPROBS

MAX_ITEMS = 2048

_BREAKPOINT = frozenset({"prompt_cache_breakpoint"})
_STATUS = frozenset({"id", "status"})


class InputText(Form):
    """Text."""

    ignored = _BREAKPOINT

    type: Literal["input_text"]
    text: str


class InputImage(Bounds):
    """A picture, by its URL or as a file; ``detail`` "low" means one tile."""

    ignored = _BREAKPOINT

    type: Literal["input_image"]
    image_url: str | None = Field(None, min_length=1)
    file_id: str | None = Field(None, min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "InputImage":
        if (self.image_url is None) == (self.file_id is None):
            raise wrong("must have either 'image_url' or 'file_id'")
        return self


class InputFile(Bounds):
    """A picture or a video that was uploaded; ``detail`` "low" means one tile of a picture."""

    ignored = _BREAKPOINT | {"filename"}

    type: Literal["input_file"]
    file_id: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    file_data: None = None
    file_url: None = None


class OutputTextPart(Form):
    """Text of an earlier answer."""

    ignored = frozenset({"annotations", "logprobs"})

    type: Literal["output_text"]
    text: str


class OutputRefusalPart(Form):
    """Something an assistant declined to do; rendered as its text."""

    type: Literal["refusal"]
    refusal: str


def _input_texts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _output_texts(value: object) -> object:
    return [{"type": "output_text", "text": value}] if isinstance(value, str) else value


Shown = Annotated[
    list[
        Annotated[
            Annotated[InputText, Tag("<input_text>")]
            | Annotated[InputImage, Tag("<input_image>")]
            | Annotated[InputFile, Tag("<input_file>")],
            Discriminator(tag_of),
            BeforeValidator(one_of("input_text", "input_image", "input_file")),
        ]
    ],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_input_texts),
    OrText(),
]


class _MessageItem(Form):
    ignored = _STATUS | {"phase"}

    type: Literal["message"] | None = None


class InstructionItem(_MessageItem):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Annotated[
        list[Annotated[InputText, BeforeValidator(one_of("input_text"))]],
        Field(max_length=MAX_PARTS),
        BeforeValidator(_input_texts),
        OrText(),
    ]


class UserItem(_MessageItem):
    """A turn of the user's."""

    role: Literal["user"]
    content: Shown


class AssistantItem(_MessageItem):
    """A turn of the model's."""

    role: Literal["assistant"]
    content: Annotated[
        list[
            Annotated[
                Annotated[OutputTextPart, Tag("<output_text>")]
                | Annotated[OutputRefusalPart, Tag("<refusal>")],
                Discriminator(tag_of),
                BeforeValidator(one_of("output_text", "refusal")),
            ]
        ],
        Field(max_length=MAX_PARTS),
        BeforeValidator(_output_texts),
        OrText(),
    ]


class CallItem(Form):
    """A call that the model made; ``arguments`` is the text of a JSON object."""

    ignored = _STATUS | {"async", "caller", "namespace"}

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str


class ResultItem(Form):
    """What a call gave."""

    ignored = _STATUS | {"caller"}

    type: Literal["function_call_output"]
    call_id: str
    output: Shown


class ReasoningItem(Form):
    """What a model thought in an earlier turn; not shown to this one."""

    ignored = _STATUS | {"content", "encrypted_content", "summary"}

    type: Literal["reasoning"]


_ITEMS = one_of("message", "function_call", "function_call_output", "reasoning")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _item(value: object) -> object:
    if not isinstance(value, dict):
        raise wrong("must be an object with a 'type'")
    if value.get("type") is not None or "role" not in value:
        _ITEMS(value)
    if _kind(value) == "message" and value.get("role") not in tuple(_ROLES):
        found = clip(value["role"]) if "role" in value else "missing"
        raise wrong(f"is {found}; supported are {', '.join(map(repr, _ROLES))}", "role")
    return value


def _kind(value: dict[str, Any]) -> str:
    return str(value.get("type") or "message")


def _item_tag(value: Any) -> str:
    if not isinstance(value, dict):
        value = {"type": value.type, "role": getattr(value, "role", None)}
    kind = _kind(value)
    return f"<{_ROLES[value['role']] if kind == 'message' else kind}>"


Item = Annotated[
    Annotated[InstructionItem, Tag("<system>")]
    | Annotated[UserItem, Tag("<user>")]
    | Annotated[AssistantItem, Tag("<assistant>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[ResultItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_item_tag),
    BeforeValidator(_item),
]

ITEM: TypeAdapter[Any] = TypeAdapter(Item)
"""Reads an item that was valid before."""


def _items(value: object) -> object:
    """A string is a turn of the user's."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(Form):
    """A function that the client runs."""

    ignored = frozenset({"allowed_callers", "async", "defer_loading", "output_schema"})

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Form):
    """One function by name."""

    type: Literal["function"]
    name: str


class AllowedTools(Form):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[FunctionChoice, BeforeValidator(one_of("function"))]],
        Field(max_length=MAX_TOOLS),
    ]


_MODES = ("auto", "none", "required")


def _choice(value: object) -> object:
    if isinstance(value, dict):
        return one_of("function", "allowed_tools")(value)
    if value not in _MODES:
        raise wrong("must be 'auto', 'none', 'required', or an object")
    return value


def _choice_tag(value: object) -> str:
    return "<mode>" if isinstance(value, str) else tag_of(value)


Choice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("<mode>")]
    | Annotated[FunctionChoice, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(_choice_tag),
    BeforeValidator(_choice),
]


class PlainFormat(Form):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchemaFormat):
    """A value of a schema."""

    ignored = frozenset({"description"})

    type: Literal["json_schema"]


class TextConfig(Form):
    """What the answer must look like."""

    ignored = frozenset({"verbosity"})

    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<text>")]
            | Annotated[PlainFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")],
            Discriminator(tag_of),
            BeforeValidator(one_of("text", "json_object", "json_schema")),
        ]
        | None
    ) = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponsesRequest(Generation):
    """POST /v1/responses, and /v1/responses/input_tokens."""

    ignored = Generation.ignored | {
        "access_programs",
        "image",
        "max_tool_calls",
        "moderation",
        "personality",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "safety_identifier",
        "service_tier",
    }
    refused: ClassVar[dict[str, tuple[Any, ...]]] = Generation.refused | {
        "context_management": ([],),
        "conversation": (),
        "prompt": (),
        "truncation": ("disabled",),
        # Of other APIs, where this one has its own way or none
        "echo": (False,),
        "max_tokens": (),
        "n": (1,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "response_format": (),
    }

    input: Annotated[
        list[Item], Field(min_length=1, max_length=MAX_ITEMS), BeforeValidator(_items), OrText()
    ]
    instructions: str | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(one_of("function"))]],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: Annotated[list[str], Field(max_length=16)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = Field(None, min_length=1, max_length=256)
    # Our own
    visual_budget: VisualBudget | None = None
    preprocess: Literal["normalized", "reference"] | None = None
    v2pe_delta: Delta | None = None

    @model_validator(mode="after")
    def _found_again(self) -> "ResponsesRequest":
        if self.background and self.store is False:
            raise wrong("is for responses that are kept; leave store out", "background")
        return self
