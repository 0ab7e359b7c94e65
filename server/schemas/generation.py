"""What every request for generated text may ask for, whatever its dialect: sampling, the form of
the answer, and how it is sent. Each field of the OpenAI API and of vLLM's extensions is a field of
a request's form, or among its ``ignored`` or ``refused``: a test holds them against the official
client, and docs/api.md against them. Incoming JSON is validated by pydantic, strictly."""

import re
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field

from server.schemas.form import Form, OrText, clip, wrong
from wire.sampling import MAX_LOGPROBS, MAX_SEED

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 16
MAX_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 64
MAX_LABELS = 64
MAX_LABEL_LENGTH = 128
MAX_BOXES = 100
# Log-probabilities that one answer reports of its prompt: tokens times (1 + the likeliest of each).
MAX_PROMPT_LOGPROBS = 32768


class StreamOptions(Form):
    """``include_usage`` adds a last chunk with the token counts. A ``resumable`` stream has
    numbered events, and outlives its connection."""

    ignored = frozenset({"continuous_usage_stats", "include_obfuscation"})

    include_usage: bool | None = None
    resumable: bool | None = None


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
            raise wrong(f"has the key {clip(key)}; keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
    Field(max_length=MAX_TOKEN_IDS),
]


def _schema(value: object) -> object:
    """A JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise wrong("must be a JSON schema") from None
    return value


def _schema_name(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch("[a-zA-Z0-9_-]{1,64}", value):
        raise wrong("must be 1 to 64 letters, digits, '_' or '-'")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema), OrText()]
ChoiceTexts = list[str]


class JsonSchemaFormat(Form):
    """With ``strict``, a schema that cannot be enforced whole is refused."""

    ignored = frozenset({"description"})

    name: Annotated[str, BeforeValidator(_schema_name)]
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


def _label(value: object) -> object:
    if isinstance(value, str) and value != value.strip():
        raise wrong("must not begin or end with a blank")
    return value


Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_LENGTH), BeforeValidator(_label)]


class BoxesFormat(Form):
    """The labels that boxes may have, how many there may be, and which picture they are in."""

    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS)] | None = None
    max_boxes: int | None = Field(None, ge=1, le=MAX_BOXES)
    image_index: int | None = Field(None, ge=0)


class ResponseFormat(Form):
    """OpenAI's way to say what an answer must look like; boxes are our own extension."""

    type: Literal["text", "json_object", "json_schema", "internvl_boxes"]
    json_schema: JsonSchemaFormat | None = None
    internvl_boxes: BoxesFormat | None = None


class StructuredOutputs(Form):
    """vLLM's way: one of the five. What would change their meaning is refused."""

    ignored = frozenset({"disable_any_whitespace", "disable_fallback"})

    definition: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_additional_properties: None = None


class Generation(Form):
    """A request for generated text: the fields that all dialects have."""

    ignored = frozenset(
        {
            "user",
            # vLLM and SGLang
            "request_id",
            "rid",
            "session_id",
            "spaces_between_special_tokens",
            "stream_interval",
            "truncation_side",
        }
    )
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        # vLLM
        "ec_transfer_params": ({},),
        "kv_transfer_params": ({},),
        "length_penalty": (1,),
        "logits_processors": ([],),
        "logprob_token_ids": ([],),
        "repetition_detection": (),
        "return_tokens_as_token_ids": (False,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "vllm_xargs": ({},),
        # SGLang, LMDeploy and llama.cpp
        "custom_logit_processor": (),
        "custom_params": ({},),
        "ebnf": (),
        "grammar": ("",),
        "json_schema": (),
        "lora_path": (),
        "min_new_tokens": (0,),
        "no_stop_trim": (False,),
        "regex": (),
        "return_hidden_states": (False,),
        "stop_regex": (),
    }

    prompt_field: ClassVar[str]
    """The field that a prompt which is too long is blamed on."""

    shortens: ClassVar[bool] = False
    """Whether a length that does not fit becomes what fits, or is refused."""

    usual_length: ClassVar[int | None] = None
    """Tokens of an answer whose length was not asked for; None means all that fit."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[Biases | None, BeforeValidator(_biases)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Annotated[
        Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        BeforeValidator(_stops),
        OrText(),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    skip_special_tokens: bool | None = None

    @property
    def length(self) -> tuple[str, int | None]:
        """The field that says how many tokens may be generated, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def choices(self) -> int:
        """How many answers to draw."""
        return self.n or 1

    @property
    def likeliest(self) -> int:
        """How many of the likeliest tokens to report beside each generated one; -1 for none, and
        not that one either."""
        return -1

    @property
    def prompt_likeliest(self) -> int:
        """The same for each token of the prompt."""
        return -1 if self.prompt_logprobs is None else self.prompt_logprobs
