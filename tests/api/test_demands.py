"""What a request demands of its answer: which grammar the engine gets, and what is refused."""

import json
from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletionToolParam

from server.chat.tools import render_call
from tests.api.conftest import House, Houses
from tests.api.test_errors import check_refusal, error_of
from tests.fake_engine import FakeEngine, make_ready, say
from wire.sampling import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT = json.dumps(SCHEMA)
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
TIME: ChatCompletionToolParam = {"type": "function", "function": {"name": "time"}}
HELLO: Any = [{"role": "user", "content": "Hello!"}]


def schema_format(**values: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **values}}


def outputs(**values: Any) -> dict[str, Any]:
    return {"structured_outputs": values}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


LOOSE, STRICT = Grammar("json_schema", TEXT, strict=False), Grammar("json_schema", TEXT)
CHOICE = Grammar("choice", '["ä", "b"]')
LARK = 'start: "a" | "b"'


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"response_format": schema_format(schema=SCHEMA, strict=True)}, STRICT),
        ({"response_format": schema_format(schema=SCHEMA, strict=False)}, LOOSE),
        ({"response_format": schema_format(schema=SCHEMA)}, LOOSE),
        ({"response_format": schema_format()}, Grammar("json_object")),
        (outputs(json=SCHEMA), STRICT),
        (outputs(json=TEXT), STRICT),
        (outputs(regex="a+"), Grammar("regex", "a+")),
        (outputs(choice=["ä", "b"]), CHOICE),
        (outputs(grammar=LARK), Grammar("lark", LARK)),
        (outputs(json_object=True), Grammar("json_object")),
        (outputs(json_object=False, regex=None), None),
        ({"guided_json": SCHEMA}, STRICT),
        ({"guided_json": TEXT}, STRICT),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["ä", "b"]}, CHOICE),
        ({"guided_grammar": 'root ::= "a" | "b"'}, Grammar("lark", 'root ::= "a" | "b"')),
    ],
)
async def test_the_engine_gets_the_grammar_that_was_asked_for(
    house: House, body: dict[str, Any], grammar: Grammar | None
) -> None:
    assert (await house.ask(**body)).status_code == 200
    assert house.engine.requests[0].sampling.grammar == grammar


REGEX = outputs(regex="a")
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format", "object"),
    ({"response_format": {}}, "response_format.type", "missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "missing",
    ),
    (
        {"response_format": schema_format(name="a b", schema={})},
        "response_format.json_schema.name",
        "letters",
    ),
    (
        {"response_format": schema_format(schema=[])},
        "response_format.json_schema.schema",
        "object",
    ),
    (
        {"response_format": schema_format(schema={"type": "strin"})},
        "response_format.json_schema.schema",
        "cannot be compiled: Invalid type: strin.",
    ),
    (
        {"response_format": schema_format(schema={"not": {}}, strict=True)},
        "response_format.json_schema.schema",
        'Unimplemented keys: ["not"]',
    ),
    ({"response_format": {"type": "json_object"}, **REGEX}, "structured_outputs.regex", "both"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_"),
    (outputs(regex="a", json={}), "structured_outputs.regex", "structured_outputs.json and "),
    (outputs(regex="(?=a)"), "structured_outputs.regex", "look-around"),
    (outputs(regex="a" * 70_000), "structured_outputs.regex", "65536"),
    (outputs(regex=5), "structured_outputs.regex", "string"),
    (outputs(choice=[]), "structured_outputs.choice", "1 to 1024"),
    (outputs(choice=["a"] * 1025), "structured_outputs.choice", "1 to 1024"),
    (outputs(choice=[1]), "structured_outputs.choice[0]", "string"),
    (outputs(json="{"), "structured_outputs.json", "JSON schema"),
    (outputs(json="[]"), "structured_outputs.json", "object"),
    (outputs(grammar="start: ("), "structured_outputs.grammar", "cannot be compiled: "),
    (outputs(grammar="start: a\n" * 600), "structured_outputs.grammar", "512 lines"),
    (outputs(structural_tag="{}"), "structured_outputs.structural_tag", "not supported"),
    (outputs(whitespace_pattern=" *"), "structured_outputs.whitespace_pattern", "not supported"),
    ({"guided_json": {"multipleOf": 999_983, "type": "integer"}}, "guided_json", "takes too long"),
    ({"guided_json": json.loads('{"items":' * 70 + "{}" + "}" * 70)}, "guided_json", "64 levels"),
    ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json", "does not fetch"),
    ({**REGEX, "ignore_eos": True}, "ignore_eos", "structured_outputs.regex"),
    ({"tool_choice": "required"}, "tools", "no tools"),
    (
        {"tools": [{"type": "function", "function": {"name": "a</tool_call>"}}]},
        "tools[0].function.name",
        "tag that ends a call",
    ),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice", "'required'"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice", "'custom'"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice", "function.name"),
    ({"tools": [WEATHER], "tool_choice": named("time")}, "tool_choice", "among the tools"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}},
        "tool_choice.allowed_tools",
        "",
    ),
    ({"tools": [WEATHER], "tool_choice": "required", **REGEX}, "tool_choice", "both"),
    (
        {
            "tools": [
                WEATHER,
                {
                    "type": "function",
                    "function": {
                        "name": "x",
                        "parameters": {"type": "object", "properties": {"a": {"pattern": "(?=a)"}}},
                    },
                },
            ],
            "tool_choice": "required",
        },
        "tools[1].function.parameters",
        "look-around",
    ),
]


@pytest.mark.parametrize(("body", "param", "says"), WRONG, ids=[f"{p}-{s}" for _, p, s in WRONG])
async def test_what_cannot_be_done_is_refused_by_the_name_of_its_field(
    house: House, body: dict[str, Any], param: str, says: str
) -> None:
    await check_refusal(house, body, param, says)


async def test_the_search_for_the_tool_that_is_wrong_is_bounded(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"name": "x", "parameters": {"properties": {"a": {"pattern": "(?=a)"}}}}
    tools = [WEATHER, {"type": "function", "function": wrong}]
    monkeypatch.setattr("server.chat.prepare.BLAME_TIMEOUT", 0)
    error = error_of(await house.ask(tools=tools, tool_choice="required"))
    assert error["param"] == "tool_choice"
    assert "look-around" in error["message"]


async def test_a_checkpoint_without_a_tokenizer_for_grammars_says_so(houses: Houses) -> None:
    ready = msgspec.structs.replace(make_ready(), grammars=False)
    house = await houses.open(FakeEngine(ready))
    error = error_of(await house.ask(**REGEX))
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "unsupported_parameter")


def lark(house: House) -> str:
    grammar = house.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "lark"
    return grammar.text


ONE, MANY = "start: call\n", 'start: call ("\\n" call)*\n'


@pytest.mark.parametrize(
    ("choice", "parallel", "start", "callable_names"),
    [
        ("required", None, MANY, ["weather", "time"]),
        ("required", True, MANY, ["weather", "time"]),
        ("required", False, ONE, ["weather", "time"]),
        (named("time"), None, ONE, ["time"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [named("time")]},
            },
            None,
            MANY,
            ["time"],
        ),
    ],
)
async def test_a_demanded_call_is_a_grammar_of_the_tools_that_may_be_called(
    house: House, choice: Any, parallel: bool | None, start: str, callable_names: list[str]
) -> None:
    house.engine.script = say(render_call(callable_names[0], {}))
    body = {"tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": parallel}
    answer = (await house.ask(**body)).json()["choices"][0]
    assert lark(house).startswith(start)
    assert [n for n in ("weather", "time") if f'\\"{n}\\"' in lark(house)] == callable_names
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": callable_names[0], "arguments": "{}"}
    assert answer["finish_reason"] == ("stop" if choice == named("time") else "tool_calls")


async def test_strict_tools_are_a_grammar_unless_the_answer_has_one(house: House) -> None:
    strict = {"type": "function", "function": {"name": "time", "strict": True}}
    await house.ask(tools=[WEATHER, strict])
    assert lark(house).startswith("start: TEXT")
    await house.ask(tools=[WEATHER, strict], **REGEX)
    assert house.engine.requests[-1].sampling.grammar == Grammar("regex", "a")
    for body in ({"tools": [WEATHER]}, {"tools": [strict], "tool_choice": "none"}):
        await house.ask(**body)
        assert house.engine.requests[-1].sampling.grammar is None
    bad = {"name": "x", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}
    answer = await house.ask(tools=[WEATHER, {"type": "function", "function": bad}])
    assert error_of(answer)["param"] == "tools[1].function.parameters"


async def test_an_answer_in_a_format_may_be_a_call_and_a_demanded_call_has_none(
    house: House,
) -> None:
    """Agents send both: they want a call, or the answer in its form."""
    both = {"tools": [WEATHER, TIME], "response_format": schema_format(schema={"type": "null"})}
    house.engine.script = say(render_call("time", {}))
    answer = (await house.ask(**both)).json()["choices"][0]
    assert lark(house).startswith(
        'start: call ("\\n" call)* | answer\nanswer: %json {"type": "null"'
    )
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "time"
    house.engine.script = say("null")
    answer = (await house.ask(**both, parallel_tool_calls=False)).json()["choices"][0]
    assert lark(house).startswith("start: call | answer\n")
    assert answer["message"]["content"] == "null"
    await house.ask(**both, tool_choice=named("time"))
    assert lark(house).startswith(ONE)
    await house.ask(**both, tool_choice="none")
    grammar = house.engine.requests[-1].sampling.grammar
    assert grammar == Grammar("json_schema", '{"type": "null"}', strict=False)
    bad = {"properties": {"a": {"pattern": "(?=a)"}}}
    wrong = {"type": "function", "function": {"name": "x", "parameters": bad}}
    error = error_of(await house.ask(**both | {"tools": [wrong]}))
    assert error["param"] == "tools[0].function.parameters"
    error = error_of(await house.ask(**both | {"response_format": schema_format(schema=bad)}))
    assert error["param"] == "response_format.json_schema.schema"


async def test_tools_that_may_not_be_called_are_not_offered(house: House) -> None:
    only = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("time")]}}
    await house.ask(tools=[WEATHER, TIME], tool_choice=only)
    await house.ask(tools=[TIME])
    first, second = house.engine.requests
    assert first.prompt == second.prompt
    assert first.sampling.grammar is None


async def test_a_named_call_ends_the_answer(house: House) -> None:
    house.engine.script = say(render_call("time", {}) + "\n" + render_call("time", {}))
    answer = (await house.ask(tools=[TIME], tool_choice=named("time"))).json()["choices"][0]
    assert len(answer["message"]["tool_calls"]) == 1
    assert answer["finish_reason"] == "stop"


async def test_arguments_are_streamed_as_they_are_written(house: House) -> None:
    arguments = {"city": "Paris, France"}
    house.engine.script = say(render_call("weather", arguments))
    stream = await house.sdk.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER], stream=True
    )
    calls = [
        call async for chunk in stream for c in chunk.choices for call in c.delta.tool_calls or ()
    ]
    first, *rest = calls
    assert first.id
    assert (first.index, first.type) == (0, "function")
    assert first.function is not None
    assert (first.function.name, first.function.arguments) == ("weather", "")
    assert len(rest) > 3
    assert all((call.id, call.type, call.index) == (None, None, 0) for call in rest)
    texts = [call.function.arguments or "" for call in rest if call.function]
    assert json.loads("".join(texts)) == arguments


async def test_the_official_clients_stream_puts_calls_together(house: House) -> None:
    said = "\n".join(render_call("weather", {"city": city}) for city in ("Paris", "Rome"))
    house.engine.script = say(said)
    stream = house.sdk.chat.completions.stream(model="tiny", messages=HELLO, tools=[WEATHER])
    async with stream as source:
        final = await source.get_final_completion()
    whole = await house.sdk.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    for answer in (final.choices[0], whole.choices[0]):
        called = [(c.function.name, c.function.arguments) for c in answer.message.tool_calls or ()]
        assert called == [("weather", '{"city": "Paris"}'), ("weather", '{"city": "Rome"}')]
        assert answer.finish_reason == "tool_calls"


async def test_a_call_that_was_cut_off_has_what_there_is_of_its_arguments(house: House) -> None:
    whole = render_call("weather", {"city": "Paris"})
    house.engine.script = say(whole[: whole.index("ris")], finish="length")
    answer = (await house.ask(tools=[WEATHER])).json()["choices"][0]
    assert answer["finish_reason"] == "length"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Pa'}
