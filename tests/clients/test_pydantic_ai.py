"""pydantic-ai: agents with tools, pictures and typed outputs, over chat completions and responses.
Its class for Anthropic does not work with the version of their SDK that it brings along."""

from typing import Any

import pytest
from pydantic_ai import Agent, BinaryContent, ImageUrl, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.asking import (
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
SETTINGS: Any = {"extra_body": ENDS | {"temperature": 0}, "max_tokens": 200}


def model(server: Server, dialect: str, name: str = MODEL, key: str = KEY) -> Any:
    kind = OpenAIChatModel if dialect == "chat" else OpenAIResponsesModel
    return kind(name, provider=OpenAIProvider(base_url=server.url + "/v1", api_key=key))


def agent(server: Server, dialect: str, **options: Any) -> Agent[None, Any]:
    return Agent(model(server, dialect), model_settings=SETTINGS, **options)


def shown(colour: str, shape: str) -> BinaryContent:
    return BinaryContent(png(colour, shape), media_type="image/png")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_pictures_are_seen_and_streamed_the_same(server: Server, dialect: str) -> None:
    asked = agent(server, dialect)
    answer = await asked.run([shown("red", "circle"), WHAT])
    assert answer.output == CIRCLE
    assert answer.usage.input_tokens > 16
    async with asked.run_stream([shown("red", "circle"), WHAT]) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == CIRCLE
    assert len(pieces) > 1
    two = await asked.run([shown("red", "circle"), shown("blue", "square"), WHICH])
    assert two.output == SECOND
    again = await asked.run("What colour is it?", message_history=answer.all_messages())
    assert "red" in again.output.lower()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_its_tool_and_answers(
    server: Server, dialect: str, stream: bool
) -> None:
    asked = agent(server, dialect)
    calls = []

    @asked.tool_plain
    def set_light(room: str, color: str) -> dict[str, bool]:
        """Set the colour of a lamp"""
        calls.append({"room": room, "color": color})
        return {"ok": True}

    if stream:
        async with asked.run_stream(LAMP) as answer:
            output = await answer.get_output()
    else:
        output = (await asked.run(LAMP)).output
    assert calls == [ARGUMENTS]
    assert output


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", [NativeOutput, ToolOutput])
async def test_an_output_has_its_type(server: Server, dialect: str, kind: Any) -> None:
    asked = agent(server, dialect, output_type=kind(Seen))
    answer = await asked.run([shown("red", "circle"), DESCRIBE])
    assert isinstance(answer.output, Seen)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_errors_have_the_servers_status_and_words(server: Server, dialect: str) -> None:
    for options, prompt, status, words in (
        ({"name": "gpt"}, "Hello!", 404, "gpt"),
        ({"key": "sk-wrong"}, "Hello!", 401, "key"),
        ({}, TOO_LONG, 400, "maximum context length"),
        ({}, [ImageUrl(server.url + "/live")], 400, "url"),
    ):
        with pytest.raises(ModelHTTPError, match=words) as caught:
            await Agent(model(server, dialect, **options)).run(prompt)
        assert caught.value.status_code == status
