"""Anthropic's official client against the demo model, through a real socket."""

import base64
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from pydantic import BaseModel

from tests.servers import Server, draw, encode

DEMO = "internvl-demo"
GREEDY: Any = {"extra_body": {"temperature": 0}}
LIGHT: Any = {
    "name": "set_light",
    "description": "Set the colour of a lamp",
    "input_schema": {
        "type": "object",
        "properties": {"room": {"type": "string"}, "color": {"type": "string"}},
        "required": ["room", "color"],
    },
}
LAMP: Any = {"role": "user", "content": "Make the light in the kitchen yellow."}


@pytest.fixture
def sdk(demo_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo_server.url, api_key="test", max_retries=0) as client:
        yield client


def picture(colour: str, shape: str, size: tuple[int, int] = (112, 112)) -> Any:
    data = base64.b64encode(encode(draw(colour, shape, size))).decode()
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


def asking(*content: Any, **options: Any) -> Any:
    turn = {"role": "user", "content": list(content)}
    return {"model": DEMO, "max_tokens": 64, "messages": [turn], **GREEDY, **options}


WHAT: Any = {"type": "text", "text": "What is in this picture?"}


def test_it_sees_streams_the_same_and_counts_what_it_reads(sdk: Anthropic) -> None:
    asked = asking(picture("green", "square", (119, 117)), WHAT)  # nobody else's, so not cached
    counted = sdk.messages.count_tokens(model=DEMO, messages=asked["messages"])
    whole = sdk.messages.create(**asked)
    with sdk.messages.stream(**asked) as stream:
        texts = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert whole.content[0].text == "A green square." == "".join(texts)
    assert len(texts) > 1
    assert whole.usage.input_tokens == counted.input_tokens
    assert whole.usage.cache_read_input_tokens == 0
    usage = streamed.usage
    assert usage.cache_read_input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens
    assert streamed.stop_reason == whole.stop_reason == "end_turn"


def test_a_stream_that_can_be_resumed_is_read_as_any_other(
    sdk: Anthropic, demo_server: Server
) -> None:
    asked = asking(picture("green", "square"), WHAT)
    whole = sdk.messages.create(**asked)
    asked["extra_body"] = GREEDY["extra_body"] | {"stream_options": {"resumable": True}}
    with sdk.messages.stream(**asked) as stream:
        started = next(event for event in stream if event.type == "message_start").message
        streamed = stream.get_final_message()
        place = stream.response.headers["content-location"]
    assert streamed.content[0].text == whole.content[0].text
    # What was found in the cache is known from the beginning.
    assert started.usage.cache_read_input_tokens
    assert started.usage.cache_read_input_tokens == streamed.usage.cache_read_input_tokens
    assert started.usage.input_tokens == streamed.usage.input_tokens
    again = httpx.get(f"{demo_server.url}/v1/{place}", timeout=60).text
    assert again.startswith("id: 1\nevent: message_start\n")
    assert again.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


def test_a_stop_sequence_and_a_beginning_of_the_answer(sdk: Anthropic) -> None:
    asked = asking(picture("red", "circle"), WHAT)
    stopped = sdk.messages.create(**asked, stop_sequences=["never", " circ"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " circ")
    assert stopped.content[0].text == "A red"
    asked["messages"].append({"role": "assistant", "content": "A red"})
    assert sdk.messages.create(**asked).content[0].text == " circle."


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, None])
def test_a_call_is_streamed_and_its_result_understood(
    sdk: Anthropic, choice: dict[str, Any] | None
) -> None:
    choice = choice or {"type": "tool", "name": "set_light"}
    asked: Any = {"model": DEMO, "max_tokens": 100, "tools": [LIGHT], **GREEDY}
    whole = sdk.messages.create(messages=[LAMP], tool_choice=choice, **asked)
    pieces = []
    with sdk.messages.stream(messages=[LAMP], tool_choice=choice, **asked) as stream:
        for event in stream:
            if event.type == "input_json":
                pieces.append(event.partial_json)
        streamed = stream.get_final_message()
    (call,) = streamed.content
    assert call.type == "tool_use"
    assert (call.name, call.input["room"]) == ("set_light", "kitchen")
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert whole.content[0].input == call.input
    assert len(pieces) > 2
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"ok": true}'}
    history: Any = [
        LAMP,
        {"role": "assistant", "content": streamed.content},
        {"role": "user", "content": [result]},
    ]
    answer = sdk.messages.create(messages=history, **asked)
    assert answer.stop_reason == "end_turn"
    assert answer.content[0].text


def test_a_picture_in_a_result_is_seen(sdk: Anthropic) -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "set_light", "input": {}}
    shown = picture("blue", "triangle")
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [shown]}
    answer = sdk.messages.create(
        model=DEMO,
        max_tokens=40,
        messages=[
            LAMP,
            {"role": "assistant", "content": [used]},
            {"role": "user", "content": [result, WHAT]},
        ],
        **GREEDY,
    )
    assert answer.usage.input_tokens > 16
    assert "blue" in answer.content[0].text


class Seen(BaseModel):
    color: str
    shape: str


def test_structured_output_is_what_the_client_wants_to_read(sdk: Anthropic) -> None:
    asked = asking(picture("red", "circle"), {"type": "text", "text": "Describe it as JSON."})
    answer = sdk.messages.parse(**asked, output_format=Seen)
    assert answer.parsed_output is not None
    # Small as it is the model mixes up the two keys; that they are there is the grammar's work.
    assert "red" in answer.parsed_output.model_dump().values()


def test_errors_are_the_clients_own_classes(sdk: Anthropic, demo_server: Server) -> None:
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(**asking(WHAT) | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError) as caught:
        sdk.messages.create(**asking({"type": "text", "text": "word " * 5000}))
    assert caught.value.error_code == "context_length_exceeded"
    assert caught.value.request_id
    bad: Any = {"type": "image", "source": {"type": "url", "url": demo_server.url + "/live"}}
    with pytest.raises(anthropic.BadRequestError) as caught:
        sdk.messages.create(**asking(bad))
    assert "messages[0].content[0].source.url" in str(caught.value.body)
