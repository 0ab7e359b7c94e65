"""The request of Anthropic's Messages API, field by field. What it has in common with every request
for text (``Generation``) holds here too, under the same names."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from server.schemas.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, Bounds, Delta, VisualBudget
from server.schemas.form import Form, OrText, clip, one_of, tag_of, wrong
from server.schemas.generation import MAX_STOPS, Generation, Stop

_CACHE = frozenset({"cache_control"})


def _texts(value: object) -> object:
    """A string is a block of text."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextBlock(Form):
    """Text."""

    ignored = _CACHE | {"citations"}

    type: Literal["text"]
    text: str


class Base64Source(Form):
    """A picture in the request."""

    type: Literal["base64"]
    media_type: str = Field(pattern="^image/[a-z0-9.+-]{1,32}$")
    data: str = Field(min_length=1)


class UrlSource(Form):
    """A picture somewhere else."""

    type: Literal["url"]
    url: str = Field(min_length=1)


class FileSource(Form):
    """A picture that was uploaded."""

    type: Literal["file"]
    file_id: str = Field(min_length=1)


Source = Annotated[
    Annotated[Base64Source, Tag("<base64>")]
    | Annotated[UrlSource, Tag("<url>")]
    | Annotated[FileSource, Tag("<file>")],
    Discriminator(tag_of),
    BeforeValidator(one_of("base64", "url", "file")),
]


class ImageBlock(Bounds):
    """A picture."""

    ignored = _CACHE | {"transformations"}

    type: Literal["image"]
    source: Source


class ToolUseBlock(Form):
    """A call that the assistant made in an earlier turn."""

    ignored = _CACHE | {"caller", "toolset_name"}

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]


class ThinkingBlock(Form):
    """What a model thought in an earlier turn; not shown to this one."""

    ignored = frozenset({"thinking", "signature", "data"})

    type: Literal["thinking", "redacted_thinking"]


Shown = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    Discriminator(tag_of),
    BeforeValidator(one_of("text", "image")),
]


class ToolResultBlock(Form):
    """What a call gave."""

    ignored = _CACHE | {"is_error", "toolset_name"}

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        Annotated[list[Shown], Field(max_length=MAX_PARTS)] | None,
        BeforeValidator(_texts),
        OrText(),
    ] = None


Texts = Annotated[
    list[Annotated[TextBlock, BeforeValidator(one_of("text"))]],
    Field(max_length=MAX_PARTS),
    BeforeValidator(_texts),
    OrText(),
]


class SystemMessage(Form):
    """More instructions."""

    role: Literal["system"]
    content: Texts


class UserMessage(Form):
    """A turn of the user's, tools' results included."""

    role: Literal["user"]
    content: Annotated[
        list[
            Annotated[
                Annotated[TextBlock, Tag("<text>")]
                | Annotated[ImageBlock, Tag("<image>")]
                | Annotated[ToolResultBlock, Tag("<tool_result>")],
                Discriminator(tag_of),
                BeforeValidator(one_of("text", "image", "tool_result")),
            ]
        ],
        Field(max_length=MAX_PARTS),
        BeforeValidator(_texts),
        OrText(),
    ]


class AssistantMessage(Form):
    """A turn of the model's."""

    role: Literal["assistant"]
    content: Annotated[
        list[
            Annotated[
                Annotated[TextBlock, Tag("<text>")]
                | Annotated[ToolUseBlock, Tag("<tool_use>")]
                | Annotated[ThinkingBlock, Tag("<thinking>")]
                | Annotated[ThinkingBlock, Tag("<redacted_thinking>")],
                Discriminator(tag_of),
                BeforeValidator(one_of("text", "tool_use", "thinking", "redacted_thinking")),
            ]
        ],
        Field(max_length=MAX_PARTS),
        BeforeValidator(_texts),
        OrText(),
    ]


_ROLES = ("user", "assistant", "system")


def _role(value: object) -> object:
    if not isinstance(value, dict):
        raise wrong("must be an object with a 'role'")
    role = value.get("role")
    if role not in _ROLES:
        found = clip(role) if "role" in value else "missing"
        raise wrong(f"is {found}; supported are 'user', 'assistant' and 'system'", "role")
    return value


Turn = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(lambda value: f"<{value['role']}>"),
    BeforeValidator(_role),
]


class ClientTool(Form):
    """A tool that the client runs."""

    ignored = _CACHE | {
        "allowed_callers",
        "defer_loading",
        "eager_input_streaming",
        "input_examples",
    }

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


def _client_tool(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is not None and kind != "custom":
        raise wrong(f"is {clip(kind)}; only tools of the client's own are supported", "type")
    return value


class MessageToolChoice(Form):
    """Whether tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> "MessageToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise wrong("must be there for the type 'tool', and only there", "name")
        return self


class JsonFormat(Form):
    """The answer is a value of ``schema``."""

    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Form):
    """What the answer must look like."""

    ignored = frozenset({"effort"})

    format: JsonFormat | None = None


class CountRequest(Generation):
    """POST /v1/messages/count_tokens."""

    ignored = Generation.ignored | {
        "betas",
        "cache_control",
        "context_management",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "thinking",
        "user_profile_id",
        "workspace_id",
    }
    refused: ClassVar[dict[str, tuple[Any, ...]]] = Generation.refused | {
        "container": (),
        "mcp_servers": ([],),
        "output_format": (),
        # Of other APIs, where this one has its own way or none
        "echo": (False,),
        "n": (1,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
        "response_format": (),
        "stop": ([],),
    }

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: (
        Annotated[
            list[Annotated[ClientTool, BeforeValidator(_client_tool)]],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: MessageToolChoice | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    output_config: OutputConfig | None = None
    # Our own
    visual_budget: VisualBudget | None = None
    preprocess: Literal["normalized", "reference"] | None = None
    v2pe_delta: Delta | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=2**31 - 1)
