"""OpenAI's official client and its Responses API against the demo model, through a real socket."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.servers import Server, data_uri, draw, encode

DEMO = "internvl-demo"
LIGHT: Any = {
    "type": "function",
    "name": "set_light",
    "description": "Set the colour of a lamp",
    "parameters": {
        "type": "object",
        "properties": {"room": {"type": "string"}, "color": {"type": "string"}},
        "required": ["room", "color"],
        "additionalProperties": False,
    },
    "strict": True,
}
LAMP = "Make the light in the kitchen yellow."


@pytest.fixture
def sdk(demo_server: Server) -> Iterator[OpenAI]:
    with demo_server.client() as client:
        yield client


def turn(*content: Any) -> Any:
    return {"role": "user", "content": list(content)}


def picture(colour: str, shape: str, size: tuple[int, int] = (112, 112)) -> Any:
    url = data_uri(encode(draw(colour, shape, size)))
    return {"type": "input_image", "detail": "auto", "image_url": url}


def text(words: str) -> Any:
    return {"type": "input_text", "text": words}


def asking(*items: Any, **options: Any) -> Any:
    return {"model": DEMO, "input": list(items), "temperature": 0, **options}


def test_it_sees_streams_the_same_and_counts_what_it_reads(sdk: OpenAI) -> None:
    unique = picture("green", "square", (121, 117))  # nobody else's, so not cached
    asked = asking(turn(unique, text("What is in this picture?")))
    counted = sdk.responses.input_tokens.count(model=DEMO, input=asked["input"])
    whole = sdk.responses.create(**asked)
    with sdk.responses.stream(**asked) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    assert whole.output_text == streamed.output_text == "".join(texts) == "A green square."
    assert len(texts) > 1
    assert whole.status == streamed.status == "completed"
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.input_tokens == streamed.usage.input_tokens == counted.input_tokens
    assert whole.usage.input_tokens_details.cached_tokens == 0
    assert streamed.usage.input_tokens_details.cached_tokens


def test_a_later_turn_asks_about_the_picture_of_the_first(sdk: OpenAI) -> None:
    first = sdk.responses.create(
        **asking(turn(picture("red", "circle"), text("What is in this picture?")))
    )
    assert first.output_text == "A red circle."
    goes_on: Any = {"previous_response_id": first.id}
    second = sdk.responses.create(**asking(turn(text("What colour is it?")), **goes_on))
    assert "red" in second.output_text.lower()
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= 16  # the picture among them
    assert sdk.responses.retrieve(second.id).output_text == second.output_text
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(**asking(turn(text("And?")), **goes_on))
    # The second holds its conversation itself.
    third = sdk.responses.create(
        **asking(turn(text("What is in this picture?")), previous_response_id=second.id)
    )
    assert "red" in third.output_text


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "set_light"}])
def test_a_call_is_streamed_and_its_result_understood(sdk: OpenAI, choice: Any) -> None:
    asked = asking(turn(text(LAMP)), tools=[LIGHT], tool_choice=choice)
    whole = sdk.responses.create(**asked)
    with sdk.responses.stream(**asked) as stream:
        pieces = [
            event.delta
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        streamed = stream.get_final_response()
    (call,) = streamed.output
    assert call.type == "function_call"
    assert (call.name, call.status) == ("set_light", "completed")
    assert '"kitchen"' in call.arguments
    assert "".join(pieces) == call.arguments == whole.output[0].arguments
    assert len(pieces) > 2
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"ok": true}'}
    answer = sdk.responses.create(**asking(result, tools=[LIGHT], previous_response_id=streamed.id))
    assert answer.output_text
    by_hand = sdk.responses.create(
        **asking(turn(text(LAMP)), *streamed.output, result, tools=[LIGHT])
    )
    assert by_hand.output_text == answer.output_text


class Seen(BaseModel):
    color: str
    shape: str


def test_structured_output_is_what_the_client_wants_to_read(sdk: OpenAI) -> None:
    asked = asking(turn(picture("red", "circle"), text("Describe it as JSON.")))
    answer = sdk.responses.parse(**asked, text_format=Seen)
    assert answer.output_parsed is not None
    assert "red" in answer.output_parsed.model_dump().values()


def test_an_answer_that_is_cut_off_is_incomplete(sdk: OpenAI) -> None:
    answer = sdk.responses.create(
        **asking(turn(picture("red", "circle"), text("What is it?")), max_output_tokens=2)
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_one_in_the_background_is_left_found_again_and_cancelled(sdk: OpenAI) -> None:
    asked = asking(turn(picture("red", "circle"), text("What is it?")), background=True)
    whole = sdk.responses.create(**asking(turn(picture("red", "circle"), text("What is it?"))))
    numbers, texts = [], []
    for event in (stream := sdk.responses.create(**asked, stream=True)):
        if event.type == "response.created":
            name = event.response.id
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
            break
    stream.close()
    for event in sdk.responses.retrieve(name, stream=True, starting_after=numbers[-1]):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
    assert numbers == list(range(len(numbers)))
    assert "".join(texts) == whole.output_text == sdk.responses.retrieve(name).output_text
    (item,) = sdk.responses.input_items.list(name)
    assert [part.type for part in item.content] == ["input_image", "input_text"]
    long = asking(turn(text("Hello!")), background=True, extra_body={"ignore_eos": True})
    running = sdk.responses.create(**long)
    assert running.status == "queued"
    assert sdk.responses.cancel(running.id).status == "cancelled"
    assert sdk.responses.retrieve(running.id).status == "cancelled"


def test_errors_are_the_clients_own_classes(sdk: OpenAI, demo_server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.responses.create(model="gpt", input="Hello!")
    assert missing.value.code == "model_not_found"
    bad = {"type": "input_image", "image_url": demo_server.url + "/live", "detail": "auto"}
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(**asking(turn(bad)))
    assert caught.value.param == "input[0].content[0].image_url"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(**asking(turn(text("x")), truncation="auto"))
    assert caught.value.param == "truncation"
