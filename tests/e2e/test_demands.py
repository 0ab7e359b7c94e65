"""The demo model, held to grammars and to calls of tools that it never saw, over HTTP."""

import json
import re
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion

from tests.servers import Server, draw

ORDER = {
    "type": "function",
    "function": {
        "name": "place_order",
        "description": "Order something from the warehouse.",
        "parameters": {
            "type": "object",
            "properties": {
                "article": {"enum": ["bolt", "nut"]},
                "amount": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["article", "amount"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
LIGHTS = {
    "type": "function",
    "function": {
        "name": "switch-lights.v2",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "triangle"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}},
    },
    "required": ["shape"],
    "additionalProperties": False,
}
RESPONSE = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


def ask(server: Server, text: str = "Hello!", **options: Any) -> ChatCompletion:
    """The answer, after checking that its stream says the same."""
    options = {"temperature": 1.5, "seed": 3, "max_completion_tokens": 300} | options
    messages: Any = [{"role": "user", "content": text}]
    with server.client() as client:
        create = client.chat.completions
        answer = create.create(model="internvl-demo", messages=messages, **options)
        with create.stream(model="internvl-demo", messages=messages, **options) as stream:
            streamed = stream.get_final_completion()
    for whole, put_together in zip(answer.choices, streamed.choices, strict=True):
        assert put_together.finish_reason == whole.finish_reason
        assert (put_together.message.content or "") == (whole.message.content or "")
        assert calls(put_together.message) == calls(whole.message)
    return answer


def calls(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


@pytest.mark.parametrize("seed", range(4))
def test_a_named_tool_is_called_once_and_as_its_schema_says(demo_server: Server, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "place_order"}}
    answer = ask(demo_server, tools=[LIGHTS, ORDER], tool_choice=choice, seed=seed).choices[0]
    ((name, arguments),) = calls(answer.message)
    assert name == "place_order"
    jsonschema.validate(json.loads(arguments), ORDER["function"]["parameters"])  # type: ignore[index]
    assert answer.finish_reason == "stop"
    assert answer.message.content is None


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_required_call_is_made_whatever_was_said(demo_server: Server, temperature: float) -> None:
    tools = [LIGHTS, ORDER]
    options = {"tools": tools, "tool_choice": "required", "temperature": temperature}
    answer = ask(demo_server, "What is two plus two?", **options).choices[0]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}  # type: ignore[index]
    assert calls(answer.message)
    for name, arguments in calls(answer.message):
        jsonschema.validate(json.loads(arguments), schemas[name])
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None


def test_one_call_is_made_where_no_more_are_wanted(demo_server: Server) -> None:
    options = {"tools": [ORDER], "tool_choice": "required", "parallel_tool_calls": False}
    for seed in range(3):
        assert len(calls(ask(demo_server, seed=seed, **options).choices[0].message)) == 1


def test_a_strict_tool_is_called_as_its_schema_says_if_the_model_calls_it(
    demo_server: Server,
) -> None:
    def arguments(**options: Any) -> str:
        rooms = {"room": {"enum": ["attic", "cellar"]}, "color": {"type": "string"}}
        parameters = {
            "type": "object",
            "properties": rooms,
            "required": ["room", "color"],
            "additionalProperties": False,
        }
        function = {"name": "set_light", "parameters": parameters, **options}
        tools = [{"type": "function", "function": function}]
        text = "Make the light in the kitchen red."
        answer = ask(demo_server, text, tools=tools, temperature=0).choices[0]
        ((name, found),) = calls(answer.message)
        assert (name, answer.finish_reason) == ("set_light", "tool_calls")
        return found

    assert json.loads(arguments())["room"] == "kitchen"
    assert json.loads(arguments(strict=True))["room"] in ("attic", "cellar")


def test_every_choice_keeps_to_a_schema_and_equals_the_one_drawn_alone(
    demo_server: Server,
) -> None:
    both = ask(demo_server, response_format=RESPONSE, n=2).choices
    alone = [ask(demo_server, response_format=RESPONSE, seed=seed).choices[0] for seed in (3, 4)]
    assert [c.message.content for c in both] == [c.message.content for c in alone]
    for choice in both:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_a_cut_off_answer_is_the_beginning_of_a_sentence(demo_server: Server) -> None:
    with demo_server.client() as client:
        messages: Any = [{"role": "user", "content": "Hello!"}]
        format: Any = RESPONSE
        (answer,) = client.chat.completions.create(
            model="internvl-demo", messages=messages, response_format=format, max_tokens=4
        ).choices
    assert answer.finish_reason == "length"
    assert (answer.message.content or "").startswith('{"shape"')


def test_the_other_constraints_hold_too(demo_server: Server) -> None:
    def text(**constraint: Any) -> str:
        answer = ask(demo_server, extra_body=constraint).choices[0]
        assert answer.finish_reason == "stop"
        return answer.message.content or ""

    assert re.fullmatch(r"[A-Z]{2}-\d{3}", text(structured_outputs={"regex": r"[A-Z]{2}-\d{3}"}))
    assert text(guided_choice=["left", "right <box>"]) in ("left", "right <box>")
    gbnf = 'root ::= ("tick" | "tock") "!"'
    assert text(structured_outputs={"grammar": gbnf}) in ("tick!", "tock!")


def test_with_tools_and_a_format_the_answer_is_a_call_or_in_the_format(demo_server: Server) -> None:
    """As agents ask, which want a call first and then an answer that they can read."""
    rooms = {"room": {"type": "string"}, "color": {"type": "string"}}
    parameters = {"type": "object", "properties": rooms, "required": ["room", "color"]}
    light = {"type": "function", "function": {"name": "set_light", "parameters": parameters}}
    options: dict[str, Any] = {"tools": [light], "temperature": 0, "response_format": RESPONSE}
    answer = ask(demo_server, "Make the light in the kitchen yellow.", **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    ((name, arguments),) = calls(answer.message)
    assert (name, json.loads(arguments)["room"]) == ("set_light", "kitchen")
    said = demo_server.ask(draw("red", "circle"), "Describe it as JSON.", **options)
    assert said.startswith('{"shape": "circle"')
    named: Any = {"type": "function", "function": {"name": "set_light"}}
    answer = ask(demo_server, "Hello!", **options | {"tool_choice": named}).choices[0]
    assert calls(answer.message)
