"""Fields that nobody knows: told in a header, or refused with --strict-fields. And what a client
may hand to a chat template that is not there."""

import string
import typing
from typing import Any

import openai.types.chat as official
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import chat_completion_message_param as messages

from server.routes.body import MAX_TOLD
from server.schemas.chat import ImagePart, Message, Prediction, TextPart
from server.schemas.form import Form
from tests.api.conftest import House, Houses
from tests.api.test_errors import error_of

HEADER = "X-InternVL-Ignored-Fields"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}}
HELLO: Any = {"role": "user", "content": "Hello!"}

# A body, and the path of the one field in it that is unknown.
UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"messages": [HELLO | {"mood": "good"}]}, "messages[0].mood"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "", "x": 0}, PICTURE]}
            ]
        },
        "messages[0].content[0].x",
    ),
    (
        {
            "messages": [
                HELLO,
                {
                    "role": "user",
                    "content": [PICTURE | {"image_url": PICTURE["image_url"] | {"tiles": 1}}],
                },
            ]
        },
        "messages[1].content[0].image_url.tiles",
    ),
    ({"stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "returns": {}}}]},
        "tools[0].function.returns",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"anything": 1}, "scheme": {}},
            }
        },
        "response_format.json_schema.scheme",
    ),
    ({"visual_budget": {"max_tiles": 3, "frames": 2}}, "visual_budget.frames"),
]


@pytest.mark.parametrize(("body", "path"), UNKNOWN)
async def test_an_unknown_field_is_told_or_refused_by_its_path(
    houses: Houses, body: dict[str, Any], path: str
) -> None:
    easy = await houses.open()
    strict = await houses.open(strict_fields=True)
    answer = await easy.ask(**body)
    assert answer.status_code == 200
    assert answer.headers[HEADER] == path
    for route in ("/v1/chat/completions", "/v1/internvl/preview"):
        refused = await strict.http.post(route, json={"messages": [HELLO]} | body)
        assert refused.status_code == 400
        error = error_of(refused)
        assert (error["param"], error["code"]) == (path, "unknown_parameter")
    assert not strict.engine.requests


async def test_every_route_and_a_stream_tell_it(house: House) -> None:
    streamed = await house.ask(stream=True, wrong=1)
    preview = await house.http.post("/v1/internvl/preview", json={"messages": [HELLO], "wrong": 1})
    for options in ({}, {"stream": True}):
        body = {"prompt": "Hello", "wrong": 1, "suffix": ""} | options
        answer = await house.http.post("/v1/completions", json=body)
        assert answer.headers[HEADER] == "wrong"
    assert streamed.headers[HEADER] == preview.headers[HEADER] == "wrong"
    assert HEADER not in (await house.ask(user="me", function_call="none", nothing=None)).headers


async def test_an_unknown_field_does_not_reach_the_model(house: House) -> None:
    function = {"name": "look", "parameters": {"type": "object", "unknown": 1}}
    await house.ask(tools=[{"type": "function", "function": function}])
    await house.ask(
        tools=[{"type": "function", "x": 1, "function": function | {"y": {"z": "injected"}}}]
    )
    plain, other = house.engine.requests
    assert plain.prompt == other.prompt


NAMES = st.text(max_size=100) | st.text(string.printable) | st.sampled_from(["\r\nSet-Cookie: x"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name.isprintable() is False or "," in name),
        st.just(1),
        min_size=1,
        max_size=40,
    )
)
async def test_no_name_can_break_out_of_the_header(house: House, names: dict[str, int]) -> None:
    answer = await house.http.post("/v1/chat/completions", json={"messages": [HELLO | names]})
    assert answer.status_code == 200
    told = answer.headers[HEADER].split(", ")
    assert len(told) == min(len(names), MAX_TOLD + 1)
    assert told[-1] == "..." or len(names) <= MAX_TOLD
    allowed = {*string.ascii_letters, *string.digits, *"_.$[]-?"}
    assert all(set(name) <= allowed for name in told)
    assert len(answer.headers[HEADER]) < 2000


async def test_an_answer_may_come_back_as_a_message_where_fields_are_strict(houses: Houses) -> None:
    house = await houses.open(strict_fields=True)
    answer = (await house.sdk.chat.completions.create(model="tiny", messages=[HELLO])).choices[0]
    raw = (await house.ask()).json()["choices"][0]["message"]
    for message in (answer.message.model_dump(), raw, raw | {"reasoning_content": "", "boxes": []}):
        again = await house.ask(messages=[HELLO, message, HELLO])
        assert again.status_code == 200
        assert HEADER not in again.headers


def test_no_field_of_the_official_messages_and_predictions_is_unknown() -> None:
    known: list[tuple[Any, type[Form]]] = [
        (official.ChatCompletionContentPartTextParam, TextPart),
        (official.ChatCompletionContentPartImageParam, ImagePart),
        (official.ChatCompletionPredictionContentParam, Prediction),
    ]
    kinds = typing.get_args(messages.ChatCompletionMessageParam)
    known += [(kind, Message) for kind in kinds]
    assert len(known) > 7
    for params, form in known:
        assert set(typing.get_type_hints(params)) <= {*form.model_fields, *form.ignored}


async def test_a_template_that_is_not_there_knows_what_a_prompt_has(house: House) -> None:
    turns = [HELLO, {"role": "assistant", "content": "A red"}]
    for fields, kwargs in (
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({}, {"enable_thinking": False, "thinking": False}),
        ({}, {}),
    ):
        for body in (fields, {"chat_template_kwargs": kwargs}):
            assert (await house.ask(messages=turns, **body)).status_code == 200
        one, other = house.engine.requests[-2:]
        assert one.prompt == other.prompt
    assert len({tuple(request.prompt) for request in house.engine.requests}) == 3
    # The request's own field wins.
    await house.ask(
        messages=turns,
        add_generation_prompt=False,
        chat_template_kwargs={"add_generation_prompt": True},
    )
    assert house.engine.requests[-1].prompt == house.engine.requests[0].prompt


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"tokenize": True}, "chat_template_kwargs.tokenize"),
        ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs.chat_template"),
        ({"enable_thinking": True}, "chat_template_kwargs.enable_thinking"),
        ({"add_generation_prompt": "no"}, "chat_template_kwargs.add_generation_prompt"),
        ([], "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_what_a_template_cannot_be_handed_is_refused_by_name(
    house: House, kwargs: Any, param: str
) -> None:
    answer = await house.ask(chat_template_kwargs=kwargs)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
