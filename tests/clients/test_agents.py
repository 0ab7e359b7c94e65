"""OpenAI's Agents SDK, over chat completions and over responses."""

from typing import Any

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI

from tests.clients.asking import (
    ARGUMENTS,
    CIRCLE,
    DESCRIBE,
    ENDS,
    KEY,
    LAMP,
    MODEL,
    WHAT,
    Seen,
    url,
)
from tests.servers import Server

KINDS = (OpenAIChatCompletionsModel, OpenAIResponsesModel)


def agent(server: Server, kind: Any, **options: Any) -> Agent:
    sdk = AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
    settings = ModelSettings(temperature=0, extra_body=ENDS)
    return Agent("lamps", model=kind(MODEL, sdk), model_settings=settings, **options)


def asked(words: str) -> Any:
    shown = {"type": "input_image", "image_url": url("red", "circle"), "detail": "auto"}
    return [{"role": "user", "content": [shown, {"type": "input_text", "text": words}]}]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_picture_is_seen_and_streamed_the_same(server: Server, kind: Any) -> None:
    lamps = agent(server, kind)
    assert (await Runner.run(lamps, asked(WHAT))).final_output == CIRCLE
    stream = Runner.run_streamed(lamps, asked(WHAT))
    pieces = [
        event.data.delta
        async for event in stream.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(pieces) == CIRCLE == stream.final_output
    assert len(pieces) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_its_tool_and_answers(server: Server, kind: Any, stream: bool) -> None:
    calls = []

    @function_tool
    def set_light(room: str, color: str) -> str:
        """Set the colour of a lamp"""
        calls.append({"room": room, "color": color})
        return '{"ok": true}'

    lamps = agent(server, kind, tools=[set_light])
    if stream:
        run = Runner.run_streamed(lamps, LAMP)
        async for _ in run.stream_events():
            pass
        answer = run.final_output
    else:
        answer = (await Runner.run(lamps, LAMP)).final_output
    assert calls == [ARGUMENTS]
    assert answer


@pytest.mark.parametrize("kind", KINDS)
async def test_an_output_has_its_type(server: Server, kind: Any) -> None:
    answer = await Runner.run(agent(server, kind, output_type=Seen), asked(DESCRIBE))
    assert isinstance(answer.final_output, Seen)
