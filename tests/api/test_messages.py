"""Anthropic's Messages API through its official client and as bytes."""

import asyncio
import base64
import json
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.api.conftest import House, Houses, listening
from tests.fake_engine import FakeEngine, say
from tests.mutants import mutants
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed

PIXEL = base64.b64encode(b"good").decode()
PICTURE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
}
LOOK: Any = {"name": "look", "description": "Look.", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"cup\\""}}\n</tool_call>'
HELLO: Any = [{"role": "user", "content": "Hello!"}]


def client(house: House) -> AsyncAnthropic:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(house.app))
    return AsyncAnthropic(base_url="http://server", api_key="key", max_retries=0, http_client=http)


async def ask(house: House, **body: Any) -> Any:
    return await house.http.post("/v1/messages", json={"max_tokens": 50, "messages": HELLO} | body)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; checks that its name is its type."""
    *parts, end = text.split("\n\n")
    assert end == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def rendered(house: House, index: int = -1) -> list[int]:
    return house.engine.requests[index].prompt


async def test_the_official_client_reads_a_whole_answer_and_a_stream_that_is_the_same(
    house: House,
) -> None:
    async with client(house) as sdk:
        asked: Any = {"model": "tiny", "max_tokens": 50, "messages": HELLO}
        whole = await sdk.messages.create(**asked)
        async with sdk.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
    assert whole.content[0].type == "text"
    assert whole.content[0].text == "A red circle."
    assert (whole.role, whole.model, whole.stop_reason) == ("assistant", "tiny", "end_turn")
    prompt = encode_rendered("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")
    assert whole.usage.input_tokens == len(prompt)
    assert whole.usage.output_tokens == len(encode_rendered("A red circle.")) + 1
    same = {"content", "stop_reason", "stop_sequence", "usage"}
    assert streamed.model_dump(include=same) == whole.model_dump(include=same)


@pytest.mark.parametrize("text", ["A red circle.", CALL, f"I look.\n{CALL}\n{CALL}", ""])
async def test_every_event_is_one_of_the_official_ones_in_the_official_order(
    houses: Houses, text: str
) -> None:
    house = await houses.open(FakeEngine(script=say(text, cached=2)))
    found = events((await ask(house, tools=[LOOK], stream=True)).text)
    for event in found:
        if event["type"] != "ping":
            TypeAdapter(RawMessageStreamEvent).validate_python(event, strict=True)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [event for event in found if event["type"].startswith("content_block")]
    started = [event for event in blocks if event["type"] == "content_block_start"]
    assert [event["index"] for event in started] == list(range(len(started)))
    for number, start in enumerate(started):
        own = [event for event in blocks if event["index"] == number]
        first = blocks.index(start)
        assert blocks[first : first + len(own)] == own  # one block after the other
        kind = {"text": "text_delta", "tool_use": "input_json_delta"}[
            start["content_block"]["type"]
        ]
        assert {event["delta"]["type"] for event in own[1:-1]} == {kind}
        assert own[-1] == {"type": "content_block_stop", "index": number}
    whole = (await ask(house, tools=[LOOK])).json()
    Message.model_validate(whole, strict=True)
    assert set(whole) <= set(Message.model_fields)
    put_together = [
        "".join(
            event["delta"].get("text", event["delta"].get("partial_json"))
            for event in blocks
            if event["type"] == "content_block_delta" and event["index"] == number
        )
        for number in range(len(started))
    ]
    for block, streamed in zip(whole["content"], put_together, strict=True):
        assert streamed == block.get("text") or json.loads(streamed) == block["input"]
    assert whole["usage"] == found[-2]["usage"]
    assert whole["usage"]["cache_read_input_tokens"] == 2
    assert whole["usage"]["input_tokens"] == len(rendered(house)) - 2
    assert whole["stop_reason"] == found[-2]["delta"]["stop_reason"]
    assert whole["stop_reason"] == ("tool_use" if "call" in text else "end_turn")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "options", "reason", "sequence"),
    [
        (say("A red circle.", finish="length"), {}, "max_tokens", None),
        (say("A red circle."), {"stop_sequences": ["never", "cir"]}, "stop_sequence", "cir"),
        (say("A red circle."), {"stop_sequences": ["never"]}, "end_turn", None),
        (say(CALL), {}, "tool_use", None),
        (say(CALL[:-30], finish="length"), {}, "max_tokens", None),
    ],
)
async def test_the_reasons_to_stop_are_anthropics(
    houses: Houses, script: Any, options: Any, reason: str, sequence: str | None, stream: bool
) -> None:
    house = await houses.open(FakeEngine(script=script))
    answer = await ask(house, tools=[LOOK], stream=stream, **options)
    found = events(answer.text)[-2]["delta"] if stream else answer.json()
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, sequence)


async def test_an_answer_that_does_not_fit_is_shorter(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=say("A red", finish="length")))
    answer = (await ask(house, max_tokens=4000)).json()
    (request,) = house.engine.requests
    assert request.sampling.max_tokens == 512 - len(request.prompt)
    assert answer["stop_reason"] == "model_context_window_exceeded"


async def test_a_conversation_with_tools_is_rendered_as_the_models_own(house: House) -> None:
    await ask(
        house,
        system=[
            {"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "short."},
        ],
        messages=[
            {"role": "user", "content": [PICTURE, {"type": "text", "text": "Look."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "Yes."},
                    {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
                    {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t2", "content": "two"},
                    {"type": "text", "text": "Go on."},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [PICTURE]},
                ],
            },
            {"role": "assistant", "content": "It is"},
        ],
    )
    shown = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>\n"
    assert rendered(house) == encode_rendered(
        "<|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>user\n{shown}Look.<|im_end|>\n"
        '<|im_start|>assistant\nYes.\n<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n<tool_response>\n{shown}\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n"
        "<|im_start|>assistant\nIt is"
    )


async def test_what_a_request_may_say_reaches_the_engine(house: House) -> None:
    await ask(
        house,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        max_tokens=5,
        seed=3,
        logit_bias={"5": 1},
        metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    )
    sampling = house.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.max_tokens, sampling.seed, sampling.logit_bias) == (5, 3, ((5, 1.0),))
    assert sampling.grammar is not None
    assert sampling.grammar.kind == "json_schema"


@pytest.mark.parametrize("parallel", [False, True])
async def test_parallel_calls_can_be_switched_off(houses: Houses, parallel: bool) -> None:
    house = await houses.open(FakeEngine(script=say(f"{CALL}\n{CALL}")))
    choice = {"type": "auto", "disable_parallel_tool_use": not parallel}
    answer = await ask(house, tools=[LOOK], tool_choice=choice)
    assert len(answer.json()["content"]) == (2 if parallel else 1)
    answer = await ask(house, tools=[LOOK], tool_choice={"type": "none"})
    assert answer.json()["content"][0]["type"] == "text"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "n"),
        ({"container": "c"}, "container"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"system": [PICTURE]}, "system[0].type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {
                "messages": [
                    HELLO[0],
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "source": {"type": "url", "url": "http://x/bad"}}
                        ],
                    },
                ]
            },
            "messages[1].content[0].source.url",
        ),
        (
            {"messages": [{"role": "user", "content": [PICTURE | {"max_tiles": 4000}]}]},
            "messages[0].content[0].max_tiles",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}
                ]
            },
            "messages[0].content[0].tool_use_id",
        ),
        (
            {
                "messages": [
                    HELLO[0],
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}],
                    },
                ]
            },
            "messages[1]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        (
            {
                "tools": [{"name": "f", "input_schema": {"properties": {"a": {"type": "x"}}}}],
                "tool_choice": {"type": "any"},
            },
            "tools[0].input_schema",
        ),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "go"}}, "tool_choice"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "output_config.format.schema",
        ),
    ],
)
async def test_what_is_wrong_is_named_as_the_client_wrote_it(
    house: House, body: Any, param: str
) -> None:
    asked: Any = {"max_tokens": 50, "messages": HELLO} | body
    async with client(house) as sdk:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await sdk.post("/v1/messages", body=asked, cast_to=object)
    assert caught.value.type == "invalid_request_error"
    error: Any = caught.value.body
    assert error["error"]["details"]["param"] == param
    message = error["error"]["message"]
    assert "image_url" not in message
    assert "parameters" not in message
    assert "response_format" not in message


@pytest.mark.parametrize(
    "failure", [EngineFailed("The engine failed."), RuntimeError("/secret/path")]
)
async def test_an_error_behind_the_first_byte_is_an_event_that_the_client_raises(
    house: House, failure: Exception
) -> None:
    house.engine.script = lambda request: [encode_rendered("A red"), failure]
    async with client(house) as sdk:
        stream = await sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO, stream=True)
        with pytest.raises(anthropic.APIStatusError) as caught:
            assert "message_stop" not in [event.type async for event in stream]
    assert caught.value.type == "api_error"
    assert "secret" not in str(caught.value)
    last = events((await ask(house, stream=True)).text)[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"


async def test_a_wrong_key_is_the_clients_authentication_error(houses: Houses) -> None:
    house = await houses.open(api_key=("other",))
    async with client(house) as sdk:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO)
        assert caught.value.request_id
        sdk.api_key = "other"
        await sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO)


async def test_the_models_are_told_to_both_clients(house: House) -> None:
    async with client(house) as sdk:
        (listed,) = [model async for model in sdk.models.list()]
        assert await sdk.models.retrieve("tiny") == listed
        ModelInfo.model_validate_json(listed.model_dump_json(), strict=True)
        with pytest.raises(anthropic.NotFoundError) as caught:
            await sdk.models.retrieve("claude")
    assert caught.value.type == "not_found_error"
    (same,) = [model async for model in house.sdk.models.list()]
    assert (listed.id, listed.display_name, listed.max_input_tokens) == (same.id, "tiny", 512)
    assert int(listed.created_at.timestamp()) == same.created


async def test_tokens_are_counted_as_the_message_itself_would_be(house: House) -> None:
    asked: Any = {
        "system": "Be short.",
        "tools": [LOOK],
        "messages": HELLO,
    }
    async with client(house) as sdk:
        count = await sdk.messages.count_tokens(model="tiny", **asked)
        assert house.engine.requests == []
        await sdk.messages.create(model="tiny", max_tokens=5, **asked)
    assert count.input_tokens == len(rendered(house))


async def test_leaving_ends_the_work(house: House) -> None:
    house.engine.script = lambda request: [encode_rendered("A red"), asyncio.Event()]
    async with (
        listening(house) as port,
        AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key="key", max_retries=0) as sdk,
    ):
        stream = await sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO, stream=True)
        async for event in stream:
            if event.type == "content_block_delta":
                break
        await stream.close()
        await asyncio.wait_for(house.engine.abort_seen.wait(), 60)


RIGHT: Any = {
    "model": "tiny",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "Be short."}],
    "messages": [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "Look."}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [PICTURE]}],
        },
    ],
    "tools": [LOOK],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "stop_sequences": ["never"],
    "temperature": 0.5,
    "top_k": 5,
    "output_config": {"effort": "low", "format": None},
    "metadata": {"user_id": "u"},
    "thinking": {"type": "disabled"},
    "visual_budget": {"max_tiles": 4},
}


async def test_whatever_is_wrong_is_answered_or_refused(house: House) -> None:
    assert (await ask(house, **RIGHT)).status_code == 200
    seen = set()
    for body in mutants(RIGHT):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = await house.http.post(path, json=body)
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code == 400:
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                param = error["details"]["param"]
                assert param is None or "image_url" not in param, (body, param)
                for ours in ("image_url", "function", "Block", "Source", "response_format"):
                    assert ours not in error["message"], (body, error)
    assert seen == {200, 400, 404}


def nested(depth: int) -> str:
    return '{"a": [' * depth + "1" + "]}" * depth


@pytest.mark.parametrize("depth", [30, 60, 120, 200, 400, 490, 5000])
async def test_deep_values_are_answered_or_refused(house: House, depth: int) -> None:
    deep = nested(depth)
    tool = f'"tools": [{{"name": "look", "input_schema": {deep}}}]'
    used = f'{{"type": "tool_use", "id": "t", "name": "look", "input": {deep}}}'
    for fields in (
        f'"messages": [{{"role": "assistant", "content": [{used}]}}, '
        '{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]',
        f'"messages": {deep}',
        f'"messages": [{{"role": "user", "content": {deep}}}]',
        f'"messages": [{{"role": "user", "content": "x", "whatever": {deep}}}]',
        f'{tool}, "messages": [{{"role": "user", "content": "x"}}]',
        f'{tool}, "tool_choice": {{"type": "any"}}, '
        '"messages": [{"role": "user", "content": "x"}]',
        f'"output_config": {{"format": {{"type": "json_schema", "schema": {deep}}}}}, '
        '"messages": [{"role": "user", "content": "x"}]',
    ):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = await house.http.post(
                path,
                headers={"Content-Type": "application/json"},
                content=f'{{"max_tokens": 1, {fields}}}',
            )
            assert answer.status_code in (200, 400), answer.text
