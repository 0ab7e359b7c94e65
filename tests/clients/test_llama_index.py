"""llama-index: chats, tools and typed outputs through OpenAILike and its twin for responses. Its
class for Anthropic knows the names of Anthropic's models only."""

from typing import Any

import openai
import pytest
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

from tests.clients.asking import (
    ABOUT,
    ARGUMENTS,
    CIRCLE,
    DESCRIBE,
    ENDS,
    KEY,
    LAMP,
    MODEL,
    SECOND,
    TOO_LONG,
    WHAT,
    WHICH,
    Seen,
    png,
)
from tests.servers import Server

DIALECTS = ("chat", "responses")


def llm(server: Server, dialect: str, **options: Any) -> Any:
    options = {"model": MODEL, "api_key": KEY, "temperature": 0, "max_retries": 0} | options
    kind = OpenAILike if dialect == "chat" else OpenAILikeResponses
    options = {
        "api_base": server.url + "/v1",
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 4096,
        "additional_kwargs": {"extra_body": ENDS},
    } | options
    return kind(**options)


def asked(*content: Any) -> ChatMessage:
    return ChatMessage(
        role="user",
        blocks=[TextBlock(text=each) if isinstance(each, str) else each for each in content],
    )


def shown(colour: str, shape: str) -> ImageBlock:
    return ImageBlock(image=png(colour, shape), image_mimetype="image/png")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_pictures_are_seen_and_streamed_the_same(server: Server, dialect: str) -> None:
    model = llm(server, dialect)
    question = asked(shown("red", "circle"), WHAT)
    assert model.chat([question]).message.content == CIRCLE
    pieces = [piece.delta or "" for piece in model.stream_chat([question])]
    assert "".join(pieces) == CIRCLE
    assert len([piece for piece in pieces if piece]) > 1
    two = await model.achat([asked(shown("red", "circle"), shown("blue", "square"), WHICH)])
    assert two.message.content == SECOND


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_understood(
    server: Server, dialect: str, stream: bool
) -> None:
    def set_light(room: str, color: str) -> str:
        return '{"ok": true}'

    model = llm(server, dialect)
    tool = FunctionTool.from_defaults(set_light, description=ABOUT)
    if stream:
        *_, answer = model.stream_chat_with_tools([tool], user_msg=LAMP)
    else:
        answer = model.chat_with_tools([tool], user_msg=LAMP)
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("set_light", ARGUMENTS)
    said = model.predict_and_call([tool], user_msg=LAMP)
    assert "ok" in str(said)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_output_has_its_type(server: Server, dialect: str) -> None:
    model = llm(server, dialect).as_structured_llm(Seen)
    assert isinstance(model.chat([asked(shown("red", "circle"), DESCRIBE)]).raw, Seen)


def test_a_text_is_gone_on_with(server: Server) -> None:
    model = llm(server, "chat", is_chat_model=False, max_tokens=4)
    assert model.complete("Hello").text
    assert "".join(piece.delta or "" for piece in model.stream_complete("Hello"))


def test_errors_are_openais_classes(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        llm(server, "chat", api_key="sk-wrong").chat([asked("Hello!")])
    with pytest.raises(openai.NotFoundError):
        llm(server, "chat", model="gpt").chat([asked("Hello!")])
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096"):
        llm(server, "chat").chat([asked(TOO_LONG)])
