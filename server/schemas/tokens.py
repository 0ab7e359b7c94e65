"""vLLM's requests for tokens of a text or of a chat, and for the text of tokens."""

from typing import Annotated

import msgspec
from pydantic import Field

from server.schemas.chat import ChatRequest
from server.schemas.form import Form

MAX_CHARACTERS = 1 << 20


class TokenizeText(Form):
    """POST /tokenize of a text; ``add_special_tokens`` and ``parse_special`` as in completions."""

    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    model: str | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(ChatRequest):
    """POST /tokenize of a chat request."""

    return_token_strs: bool | None = None


class DetokenizeRequest(Form):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]
    model: str | None = None


class Tokens(msgspec.Struct):
    """Ids, and the entries of the vocabulary that they stand for, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    """What tokens say, with the names of special ones."""

    prompt: str
