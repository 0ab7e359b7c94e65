"""litellm, as a library: chat completions, text completions, responses and Anthropic's messages."""

import json
from typing import Any

import litellm
import pytest

from tests.clients.asking import (
    ARGUMENTS,
    CIRCLE,
    DESCRIBE,
    KEY,
    LAMP,
    LIGHT,
    MODEL,
    PICTURE,
    SECOND,
    SINGLE,
    TOO_LONG,
    TOOL,
    TWO,
    Seen,
    occupied,
    shown,
    text,
    user,
)
from tests.servers import Server


@pytest.fixture
def ask(server: Server) -> Any:
    def ask(*messages: Any, **options: Any) -> Any:
        options = {"model": f"openai/{MODEL}", "temperature": 0, "api_key": KEY} | options
        return litellm.completion(
            messages=list(messages), base_url=server.url + "/v1", max_retries=0, **options
        )

    return ask


def test_pictures_are_seen_and_streamed_the_same(ask: Any) -> None:
    whole = ask(PICTURE)
    assert whole.choices[0].message.content == CIRCLE
    chunks = list(ask(PICTURE, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == CIRCLE
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens
    assert ask(TWO).choices[0].message.content == SECOND


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": TOOL}}]
)
def test_a_tool_is_called_and_its_result_understood(ask: Any, choice: Any, stream: bool) -> None:
    asked = user(text(LAMP))
    answer = ask(asked, tools=[LIGHT], tool_choice=choice, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (TOOL, ARGUMENTS)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"ok": true}'}
    assert ask(asked, message, result, tools=[LIGHT]).choices[0].message.content


def test_an_answer_keeps_to_a_pydantic_model(ask: Any) -> None:
    answer = ask(user(shown("red", "circle"), text(DESCRIBE)), response_format=Seen)
    assert (
        "red" in Seen.model_validate_json(answer.choices[0].message.content).model_dump().values()
    )


def test_choices_stops_and_log_probabilities(ask: Any) -> None:
    answer = ask(PICTURE, n=2, stop=[" circ"], logprobs=True, top_logprobs=2, seed=1)
    assert [choice.message.content for choice in answer.choices] == ["A red", "A red"]
    assert len(answer.choices[1].logprobs.content[0].top_logprobs) == 2


def test_the_other_ways_in(server: Server) -> None:
    common: Any = {"api_key": KEY, "api_base": server.url + "/v1"}
    went_on = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="Hello", max_tokens=4, **common
    )
    assert went_on.usage.completion_tokens == 4
    asked: Any = user({"type": "input_text", "text": "Hello!"})
    response = litellm.responses(model=f"openai/{MODEL}", input=[asked], **common)
    assert response.status == "completed"
    assert response.output[0].content[0].text
    messages = litellm.completion(
        model=f"anthropic/{MODEL}",
        messages=[PICTURE],
        max_tokens=40,
        temperature=0,
        api_key=KEY,
        api_base=server.url,
    )
    assert messages.choices[0].message.content == CIRCLE


async def test_it_streams_in_an_event_loop(server: Server) -> None:
    stream: Any = await litellm.acompletion(
        model=f"openai/{MODEL}",
        messages=[PICTURE],
        temperature=0,
        stream=True,
        api_key=KEY,
        base_url=server.url + "/v1",
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == CIRCLE


def test_errors_are_its_own_classes(ask: Any, server: Server) -> None:
    with pytest.raises(litellm.AuthenticationError):
        ask(PICTURE, api_key="sk-wrong")
    with pytest.raises(litellm.NotFoundError):
        ask(PICTURE, model="openai/gpt")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(user(text(TOO_LONG)))
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(PICTURE, temperature=3)
    with occupied(server), pytest.raises(litellm.RateLimitError):
        ask(PICTURE, api_key=SINGLE)
    with pytest.raises(litellm.Timeout):
        ask(PICTURE, timeout=0.001)
    with pytest.raises(litellm.BadRequestError, match="no POST route"):
        litellm.embedding(f"openai/{MODEL}", ["x"], api_key=KEY, api_base=server.url + "/v1")
