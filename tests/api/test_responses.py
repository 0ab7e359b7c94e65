"""OpenAI's Responses API through the official client and as bytes."""

import asyncio
import json
import threading
import time
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.chat import prepare
from server.routes import responses
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import until
from tests.fake_engine import FakeEngine, say
from tests.mutants import mutants
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed, InvalidRequest, RequestAborted
from wire.messages import EngineOutput, TokenLogprobs

PICTURE: Any = {"type": "input_image", "image_url": "data:image/png;base64,good"}
LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"cup\\""}}\n</tool_call>'
OFFICIAL: Any = TypeAdapter(ResponseStreamEvent)


async def ask(house: House, **body: Any) -> Any:
    return await house.http.post("/v1/responses", json={"input": "Hello!"} | body)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; checks names and numbers."""
    *parts, end = text.split("\n\n")
    assert end == ""
    found = []
    for number, part in enumerate(parts):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(response, sort_keys=True)
    for item in response["output"]:
        for name in ("id", "call_id"):
            if name in item:
                text = text.replace(item[name], name)
    found: dict[str, Any] = json.loads(text.replace(response["id"], "id"))
    return found | {"created_at": 0, "completed_at": 0}


@pytest.mark.parametrize("text", ["A red circle.", CALL, f"I look.\n{CALL}\n{CALL}", ""])
@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_every_event_is_one_of_the_official_ones_and_the_last_is_the_whole_answer(
    houses: Houses, text: str, finish: str
) -> None:
    house = await houses.open(FakeEngine(script=say(text, finish=finish, cached=2)))
    asked: Any = {"tools": [LOOK], "metadata": {"a": "b"}, "instructions": "Be short."}
    found = events((await ask(house, stream=True, **asked)).text)
    for event in found:
        OFFICIAL.validate_python(event, strict=True)
    kinds = [event["type"].removeprefix("response.") for event in found]
    status = "completed" if finish == "stop" else "incomplete"
    assert (kinds[:2], kinds[-1]) == (["created", "in_progress"], status)
    last = found[-1]["response"]
    expected = []
    for index, item in enumerate(last["output"]):
        own = [event for event in found if event.get("output_index") == index]
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
        names = [event["type"].removeprefix("response.") for event in own]
        assert own[0]["item"]["status"] == "in_progress"
        if item["type"] == "message":
            middle = [name for name in names if name != "output_text.delta"]
            form = ["content_part.added", "output_text.done", "content_part.done"]
            deltas = "".join(e["delta"] for e in own if e["type"].endswith("text.delta"))
            assert deltas == item["content"][0]["text"] == own[-3]["text"]
        else:
            middle = [name for name in names if name != "function_call_arguments.delta"]
            form = ["function_call_arguments.done"]
            deltas = "".join(e["delta"] for e in own if e["type"].endswith("arguments.delta"))
            assert deltas == item["arguments"] == own[-2]["arguments"]
        assert middle == ["output_item.added", *form, "output_item.done"]
        assert own[-1]["item"] == item
        expected += own
    assert found[2:-1] == expected  # one item after the other
    whole = (await ask(house, **asked)).json()
    Response.model_validate(whole, strict=True)
    assert set(whole) - set(Response.model_fields) == {"store"}
    assert without_ids(whole) == without_ids(last)
    assert whole["status"] == status
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 2
    if finish == "length":
        assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_the_official_client_reads_it_and_gets_it_again(house: House) -> None:
    sdk = house.sdk
    answer = await sdk.responses.create(model="tiny", input="Hello!", instructions="Be short.")
    assert answer.output_text == "A red circle."
    assert house.engine.requests[0].prompt == encode_rendered(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert await sdk.responses.retrieve(answer.id) == answer
    async with sdk.responses.stream(model="tiny", input="Hello!") as stream:
        texts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == answer.output_text
    await sdk.responses.delete(answer.id)
    for gone in (sdk.responses.retrieve(answer.id), sdk.responses.delete(answer.id)):
        with pytest.raises(openai.NotFoundError):
            await gone


async def test_a_conversation_goes_on_from_a_response(house: House) -> None:
    async def post(**body: Any) -> Any:
        return (await ask(house, tools=[LOOK], **body)).json()

    house.engine.script = say(f"I look.\n{CALL}\n{CALL}")
    first = await post(input=[{"role": "user", "content": [PICTURE]}], instructions="Be short.")
    calls = [item["call_id"] for item in first["output"] if item["type"] == "function_call"]
    house.engine.script = say("Yes.")
    outputs = [
        {"type": "function_call_output", "call_id": calls[1], "output": "two"},
        {"type": "function_call_output", "call_id": calls[0], "output": [PICTURE]},
    ]
    second = await post(input=outputs, previous_response_id=first["id"])
    third = await post(input="And?", previous_response_id=second["id"], store=False)
    shown = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>\n"
    called = '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"cup\\""}}\n</tool_call>'
    end = encode_rendered(
        f"<|im_start|>user\n{shown}<|im_end|>\n"
        f"<|im_start|>assistant\nI look.\n{called}\n{called}<|im_end|>\n"
        f"<|im_start|>user\n<tool_response>\n{shown}\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = house.engine.requests[-1].prompt
    assert prompt[-len(end) :] == end
    assert encode_rendered("Be short.")[0] not in prompt[: -len(end)]  # instructions are not kept
    assert third["previous_response_id"] == second["id"]
    assert not third["store"]
    assert (await house.http.get(f"/v1/responses/{third['id']}")).status_code == 404
    again = await ask(house, previous_response_id=third["id"])
    assert again.status_code == 404
    assert again.json()["error"]["param"] == "previous_response_id"


async def test_a_conversation_is_no_larger_than_a_body_may_be(houses: Houses) -> None:
    house = await houses.open(max_request_bytes=3000)
    picture = PICTURE | {"image_url": "data:image/png;base64," + "x" * 2000}
    first = (await ask(house, input=[{"role": "user", "content": [picture]}])).json()
    goes_on: Any = {"previous_response_id": first["id"]}
    assert (await ask(house, **goes_on)).status_code == 200
    answer = await ask(house, input="x" * 800, **goes_on)
    assert answer.status_code == 413
    assert answer.json()["error"]["param"] == "previous_response_id"


async def test_what_went_before_counts_where_it_is_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread where there is much to read; pictures are none of that, now or before."""
    here: dict[str, list[bool]] = {}

    def noting(function: Any, owner: Any) -> None:
        own = here.setdefault(function.__name__, [])

        def noted(*arguments: Any) -> Any:
            own.append(threading.current_thread() is threading.main_thread())
            return function(*arguments)

        monkeypatch.setattr(owner, function.__name__, noted)

    noting(responses.as_chat, responses)
    noting(prepare.read_conversation, prepare)
    picture = PICTURE | {"image_url": "data:image/png;base64," + "x" * 100_000}
    parts = [{"type": "input_text", "text": ""}] * 1000
    for now, later in (([picture], []), ([picture], parts), (parts, [])):
        first = await ask(house, input=[{"role": "user", "content": now}])
        more = [{"role": "user", "content": [*later, {"type": "input_text", "text": "And?"}]}]
        goes_on = await ask(house, input=more, previous_response_id=first.json()["id"])
        assert goes_on.status_code == 200
    assert here["read_conversation"] == [True, True, True, False, False, False]
    count = {"input": "And?", "previous_response_id": first.json()["id"]}
    counted = await house.http.post("/v1/responses/input_tokens", json=count)
    assert counted.status_code == 200
    assert here["read_conversation"][6:] == [False]
    assert here["as_chat"] == [False] * 7


async def test_what_a_response_goes_on_from_has_no_more_parts_than_a_body_may_have(
    house: House,
) -> None:
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 1000}] * 12
    identity = None
    for status in (200, 200, 413):
        answer = await ask(house, input=parts, previous_response_id=identity)
        assert answer.status_code == status
        identity = answer.json().get("id")
    assert answer.json()["error"]["param"] == "previous_response_id"


async def test_a_conversation_holds_no_log_probabilities(house: House) -> None:
    """They are so many parts that it could not go on."""
    (token,) = encode_rendered(" circle")
    likely = TokenLogprobs(-0.5, [(token, -0.5)] * 20)
    house.engine.script = lambda request: [
        EngineOutput(request.id, [token] * 400, "length", logprobs=[likely] * 400)
    ]
    first = (await ask(house, top_logprobs=20)).json()
    path = f"/v1/responses/{first['id']}"
    assert (await house.http.get(path)).json() == first
    assert len(first["output"][0]["content"][0]["logprobs"]) == 400
    house.engine.script = say("Yes.")
    second = await ask(house, previous_response_id=first["id"])
    assert second.status_code == 200, second.text
    items = (await house.http.get(f"/v1/responses/{second.json()['id']}/input_items")).json()
    (part,) = items["data"][1]["content"]
    assert part == first["output"][0]["content"][0] | {"logprobs": []}


async def test_nobody_finds_the_responses_of_another_key(houses: Houses) -> None:
    house = await houses.open(api_key=("one", "two"))
    mine, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    answer = await house.http.post("/v1/responses", headers=mine, json={"input": "Hello!"})
    identity = answer.json()["id"]
    for headers, status in ((other, 404), (mine, 200)):
        path = f"/v1/responses/{identity}"
        assert (await house.http.get(path, headers=headers)).status_code == status
        goes_on = {"input": "x", "previous_response_id": identity}
        answer = await house.http.post("/v1/responses", headers=headers, json=goes_on)
        assert answer.status_code == status
    assert (await house.http.delete(path, headers=other)).status_code == 404
    assert (await house.http.delete(path, headers=mine)).status_code == 200


async def test_a_response_that_has_no_room_says_that_it_is_not_kept(houses: Houses) -> None:
    house = await houses.open(response_store_bytes=0)
    answer = (await ask(house)).json()
    assert answer["store"] is False
    assert (await house.http.get(f"/v1/responses/{answer['id']}")).status_code == 404


async def test_what_a_request_may_say_reaches_the_engine_and_is_told(house: House) -> None:
    answer = await ask(
        house,
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=5,
        top_logprobs=3,
        stop=["never"],
        seed=3,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        tools=[LOOK],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "function", "name": "look"}
        ]},
        parallel_tool_calls=False,
    )  # fmt: skip
    sampling = house.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 5)
    assert (sampling.logprobs, sampling.seed) == (3, 3)
    assert sampling.grammar is not None
    assert sampling.grammar.text.startswith("start: call | answer\n")
    told = answer.json()
    assert (told["temperature"], told["top_p"], told["max_output_tokens"]) == (0.5, 0.9, 5)
    assert told["text"] == {"format": {"type": "json_object"}}
    assert told["tool_choice"]["tools"] == [{"type": "function", "name": "look"}]
    assert told["tools"] == [LOOK | {"description": None}]
    assert told["parallel_tool_calls"] is False
    assert "X-InternVL-Ignored-Fields" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_every_token_of_a_text_has_its_log_probability(house: House, stream: bool) -> None:
    tokens = encode_rendered("A red circle.<ref>")  # the last one has no text
    house.engine.script = lambda request: [
        *(
            EngineOutput(request.id, [token], logprobs=[TokenLogprobs(-0.5, ((token, -0.5),))])
            for token in tokens
        ),
        EngineOutput(request.id, [], "length"),
    ]
    answer = await ask(house, include=["message.output_text.logprobs"], stream=stream)
    if stream:
        found = events(answer.text)
        entries = found[-1]["response"]["output"][0]["content"][0]["logprobs"]
        assert found[-4]["logprobs"] == entries  # of output_text.done
        deltas = [e for event in found if "delta" in event for e in event["logprobs"]]
        assert deltas == entries[:-1]
    else:
        entries = answer.json()["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries) == "A red circle.<ref>"
    assert {entry["logprob"] for entry in entries} == {-0.5}


async def test_the_tokens_of_a_call_are_not_those_of_the_text_around_it(house: House) -> None:
    tokens = encode_rendered(f"I look. {CALL} I see.")
    likely = [TokenLogprobs(-0.5, [(token, -0.5)]) for token in tokens]
    house.engine.script = lambda request: [
        EngineOutput(request.id, tokens, "length", logprobs=likely)
    ]
    output = (await ask(house, tools=[LOOK], top_logprobs=1)).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "message"]
    texts = [item["content"][0] for item in (output[0], output[2])]
    tokens_of = ["".join(entry["token"] for entry in text["logprobs"]) for text in texts]
    # Nothing was said between the call's end and what follows it.
    assert tokens_of == [texts[0]["text"], f"\n</tool_call>{texts[1]['text']}"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": "x" * 5000}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
         "input[0].content[0].file_id"),
        ({"input": [{"role": "system", "content": [PICTURE]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [PICTURE | {"file_id": "f"}]}]},
         "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [PICTURE | {"image_url": "http://x/bad"}]}]},
         "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [PICTURE | {"max_tiles": 999}]}]},
         "input[0].content[0].max_tiles"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
         "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
         "input[0].arguments"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 4000}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"background": True, "store": False}, "background"),
        ({"background": 1}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [LOOK], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tools"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
         "text.format.schema"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named_as_the_client_wrote_it(
    house: House, body: Any, param: str
) -> None:
    asked: Any = {"input": "Hello!"} | body
    with pytest.raises(openai.BadRequestError) as caught:
        await house.sdk.post("/responses", body=asked, cast_to=object)
    assert caught.value.param == param
    for ours in ("messages", "response_format", "max_completion_tokens", "function.p"):
        assert ours not in caught.value.message


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineFailed("The engine failed."), "server_error"),
        (InvalidRequest("messages[0] is wrong.", param="messages[0]"), "invalid_prompt"),
        (RequestAborted("Aborted."), "server_error"),
        (RuntimeError("/secret/path"), "server_error"),
    ],
)
async def test_an_error_behind_the_first_byte_is_a_failed_response(
    house: House, failure: Exception, code: str
) -> None:
    house.engine.script = lambda request: [encode_rendered("A red"), failure]
    last = events((await ask(house, stream=True)).text)[-1]
    OFFICIAL.validate_python(last, strict=True)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    error = last["response"]["error"]
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert "messages" not in error["message"]
    identity = last["response"]["id"]
    assert (await house.http.get(f"/v1/responses/{identity}")).status_code == 404
    answer = await ask(house)
    assert answer.status_code == getattr(failure, "status", 500)


async def test_tokens_are_counted_as_the_response_itself_would_be(house: House) -> None:
    before = await house.sdk.responses.create(model="tiny", input="Hello!")
    asked: Any = {"input": "And?", "tools": [LOOK], "previous_response_id": before.id}
    count = await house.sdk.responses.input_tokens.count(model="tiny", **asked)
    await house.sdk.responses.create(model="tiny", **asked)
    assert count.input_tokens == len(house.engine.requests[-1].prompt)


async def test_leaving_ends_the_work_and_keeps_nothing(house: House) -> None:
    house.engine.script = lambda request: [encode_rendered("A red"), asyncio.Event()]
    async with (
        listening(house) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key") as sdk,
    ):
        stream = await sdk.responses.create(model="tiny", input="Hello!", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        await asyncio.wait_for(house.engine.abort_seen.wait(), 60)
    assert house.service.responses.used == 0


RIGHT: Any = {
    "model": "tiny",
    "instructions": "Be short.",
    "input": [
        {"role": "user", "content": [PICTURE, {"type": "input_text", "text": "Look."}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I do.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [PICTURE]},
        {"role": "developer", "content": "Now."},
    ],
    "tools": [LOOK],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "look"}],
    },
    "parallel_tool_calls": False,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "max_output_tokens": 5,
    "top_logprobs": None,
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "reasoning": {"effort": "low"},
    "stream_options": {"include_obfuscation": False},
    "truncation": "disabled",
    "background": False,
    "store": False,
    "previous_response_id": None,
    "visual_budget": {"max_tiles": 4},
}


async def test_whatever_is_wrong_is_answered_or_refused(house: House) -> None:
    assert (await ask(house, **RIGHT)).status_code == 200
    seen = set()
    for body in mutants(RIGHT):
        for path in ("/v1/responses", "/v1/responses/input_tokens"):
            answer = await house.http.post(path, json=body)
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code == 400:
                error = answer.json()["error"]
                assert not str(error["param"]).startswith("messages"), (body, error)
                for ours in ("messages", "image_url.", "Item", "response_format", "function.p"):
                    assert ours not in error["message"], (body, error)
    assert seen == {200, 400, 404}


@pytest.mark.parametrize("depth", [30, 60, 120, 200, 400, 490, 5000])
async def test_deep_values_are_answered_or_refused(house: House, depth: int) -> None:
    deep = '{"a": [' * depth + "1" + "]}" * depth
    tool = f'"tools": [{{"type": "function", "name": "look", "parameters": {deep}}}]'
    schema = f'{{"type": "json_schema", "name": "a", "schema": {deep}}}'
    for fields in (
        f'"input": {deep}',
        f'"input": [{{"role": "user", "content": {deep}}}]',
        f'"input": [{{"role": "user", "content": "x", "id": {deep}}}]',
        f'"input": "x", {tool}',
        f'"input": "x", {tool}, "tool_choice": "required"',
        f'"input": "x", "text": {{"format": {schema}}}',
        f'"input": "x", "metadata": {deep}',
    ):
        answer = await house.http.post(
            "/v1/responses",
            headers={"Content-Type": "application/json"},
            content="{" + fields + "}",
        )
        assert answer.status_code in (200, 400), answer.text


async def test_what_is_kept_goes_when_its_time_is_over_though_nobody_asks(house: House) -> None:
    await ask(house)
    assert house.service.responses.used
    house.service.responses._clock = lambda: time.monotonic() + house.service.responses._seconds
    await until(lambda: not house.service.responses.used)  # which forgets nothing itself
