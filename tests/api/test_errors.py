"""Every refusal: its status, its envelope, the field it names, and what it must never say."""

import json
import threading
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.chat import prepare, sampling, tools
from server.chat.prompt import PromptBuilder
from server.routes import body as routes
from server.schemas import validate
from server.schemas.chat import ChatRequest
from tests.api.conftest import House, Houses
from tests.fake_engine import EOS, say
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed

HELLO: Any = [{"role": "user", "content": "Hello!"}]
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


async def check_refusal(house: House, body: dict[str, Any], param: str, says: str) -> None:
    """A 400 that names the field, before the engine hears of the request."""
    answer = await house.ask(**body)
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not house.engine.requests


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The envelope, after checking that it is one and gives nothing away."""
    assert answer.status_code >= 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    for leak in ("Traceback", "pydantic", "Error:", "server/", "/tmp", "<", "0x"):
        assert leak not in body["error"]["message"]
    return dict(body["error"])


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "array"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": "Hello"}, "messages", "array"),
    ({"messages": HELLO * 3000}, "messages", "2048"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or an array"),
    (user("x"), "messages[0].content[0]", "object"),
    (user({"text": "x"}), "messages[0].content[0].type", "missing"),
    (user({"type": "audio_url"}), "messages[0].content[0].type", "'audio_url'"),
    (user({"type": "input_audio"}), "messages[0].content[0].type", "'input_audio'"),
    (user({"type": "text"}), "messages[0].content[0].text", "missing"),
    (user({"type": "text", "text": 1}), "messages[0].content[0].text", "string"),
    (user({"type": "image_url"}), "messages[0].content[0].image_url", "missing"),
    (
        user({"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": 7}}),
        "messages[0].content[1].image_url.url",
        "string",
    ),
    (
        user({"type": "image_url", "image_url": {"url": "data:x", "detail": "ultra"}}),
        "messages[0].content[0].image_url.detail",
        "'low'",
    ),
    (
        user({"type": "image_url", "image_url": "data:bad"}),
        "messages[0].content[0].image_url.url",
        "damaged",
    ),
    (user(*[{"type": "image_url", "image_url": "data:x"}] * 5), "messages", "at most 4"),
    (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content[0].type",
        "system",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}
            ]
        },
        "messages[0].tool_calls",
        "assistant",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                }
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "JSON object",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
        "not supported",
    ),
    ({"temperature": 2.5}, "temperature", "at most 2"),
    ({"temperature": "1"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"min_p": -1}, "min_p", "at least 0"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"seed": 2**63}, "seed", "at most"),
    ({"seed": 10**30}, "seed", "at most"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens", "integer"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stop": [""]}, "stop[0]", "empty"),
    ({"stop": 5}, "stop", "array"),
    ({"stop_token_ids": [1, 9999]}, "stop_token_ids[1]", "less than"),
    ({"allowed_token_ids": [9999]}, "allowed_token_ids[0]", "less than"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "at least 0"),
    ({"logit_bias": {"9999": 1}}, "logit_bias[9999]", "less than"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]", "at most 100"),
    ({"logit_bias": [5]}, "logit_bias", ""),
    ({"presence_penalty": 2.1}, "presence_penalty", "at most 2"),
    ({"frequency_penalty": "1"}, "frequency_penalty", "number"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
    ({"allowed_token_ids": []}, "allowed_token_ids", ""),
    ({"bad_words": ["a" * 65]}, "bad_words[0]", "64"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most 8"),
    ({"bad_words": [""]}, "bad_words[0]", ""),
    ({"bad_words": ["a"] * 129}, "bad_words", "128"),
    ({"cache_salt": ""}, "cache_salt", ""),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"logprobs": 1}, "logprobs", "true or false"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": 1}, "stream_options", "object"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
    (
        {"messages": HELLO, "allowed_token_ids": [5], "min_tokens": 1, "stop_token_ids": [5]},
        "allowed_token_ids",
        "allowed_token_ids and min_tokens contradict",
    ),
    ({"messages": HELLO, "prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    ({"messages": HELLO, "prompt_logprobs": -1}, "prompt_logprobs", "at least 0"),
    ({"messages": HELLO, "prompt_logprobs": True}, "prompt_logprobs", "integer"),
    ({"messages": HELLO, "echo": "yes"}, "echo", "true or false"),
    ({"messages": HELLO, "continue_final_message": True}, "continue_final_message", "assistant"),
    (
        {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "both",
    ),
    (
        {
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": "x",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            "continue_final_message": True,
        },
        "continue_final_message",
        "tool_calls",
    ),
]


@pytest.mark.parametrize(("body", "param", "says"), WRONG, ids=[f"{p}-{s}" for _, p, s in WRONG])
async def test_a_wrong_field_is_named_as_the_client_wrote_it(
    house: House, body: dict[str, Any], param: str, says: str
) -> None:
    await check_refusal(house, body, param, says)


NOT_NEUTRAL: dict[str, Any] = {
    "modalities": ["text", "audio"],
    "echo": True,
    "add_generation_prompt": False,
}


@pytest.mark.parametrize("name", sorted(ChatRequest.refused))
async def test_a_refused_field_is_refused_by_name_unless_it_asks_for_nothing(
    house: House, name: str
) -> None:
    error = error_of(await house.ask(**{name: NOT_NEUTRAL.get(name, 7)}))
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"
    for neutral in (None, *ChatRequest.refused[name]):
        assert (await house.ask(**{name: neutral})).status_code == 200


@pytest.mark.parametrize("name", [*sorted(ChatRequest.ignored), "something_new"])
async def test_an_ignored_field_changes_nothing(house: House, name: str) -> None:
    await house.ask()
    assert (await house.ask(**{name: {"anything": [1]}})).status_code == 200
    plain, other = house.engine.requests
    assert plain.prompt == other.prompt


async def test_a_null_is_as_good_as_a_missing_field(house: House) -> None:
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert (await house.ask(**nulls)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("GET", "/nowhere", {}, b"", 404, "not_found"),
        ("GET", "/v1/models/other", {}, b"", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/models", {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", {}, b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", {"Origin": "null"}, b"{}", 415, "unsupported_media_type"),
        ("POST", "/v1/chat/completions", FORM, b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/chat/completions", FORM | {"Origin": "http://evil"}, b"{}", 415, None),
        ("POST", "/v1/chat/completions", {"Content-Type": "multipart/form-data"}, b"{}", 415, None),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, b"{}", 415, None),
        ("POST", "/v1/chat/completions", JSON, b"", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b'{"messages": [', 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b'{"temperature": NaN}', 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b'"\\ud800"', 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b"\xff\xfe", 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b"[" * 50_000, 400, "invalid_json"),
        ("POST", "/v1/chat/completions", JSON, b"[]", 400, "invalid_value"),
        ("POST", "/v1/chat/completions", JSON, b"{}", 400, "missing_required_parameter"),
    ],
)
async def test_every_wrong_request_gets_the_envelope(
    house: House,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    code: str | None,
) -> None:
    answer = await house.http.request(method, path, headers=headers, content=body)
    assert answer.status_code == status
    error = error_of(answer)
    assert code is None or error["code"] == code


async def test_an_unknown_model_is_404_and_no_model_is_fine(house: House) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await house.sdk.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    assert (await house.ask()).status_code == 200


async def test_what_cannot_fit_is_told_with_the_numbers(house: House) -> None:
    answer = await house.ask(messages=[{"role": "user", "content": "word " * 600}])
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "512" in error["message"]
    error = error_of(await house.ask(max_tokens=510))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "510" in error["message"]
    most = int(error["message"].split("can be ")[1].split(" ")[0])
    assert error_of(await house.ask(max_tokens=most + 1))["param"] == "max_tokens"
    assert (await house.ask(max_tokens=most)).status_code == 200


async def test_what_does_not_fit_names_the_share_of_each_picture(house: House) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:x"}}
    small = {"type": "image_url", "image_url": {"url": "data:y", "detail": "low"}}
    content = [picture, small, {"type": "text", "text": "x"}]
    asked = [{"role": "user", "content": content}]
    error = error_of(await house.ask(messages=asked, max_tokens=500))
    assert error["code"] == "context_length_exceeded"
    assert "9 (6 + 3) of them for pictures and videos" in error["message"]
    content[-1] = {"type": "text", "text": "word " * 250}
    error = error_of(await house.ask(messages=asked))
    assert "9 (6 + 3) of them" in error["message"]
    too_many = int(error["message"].split("for the answer: ")[1].split(" ")[0])
    length = int(error["message"].split("has ")[1].split(" ")[0])
    assert length + 1 - too_many == 512


async def test_a_hopeless_text_is_refused_without_being_tokenised(house: House) -> None:
    error = error_of(await house.ask(messages=[{"role": "user", "content": "x" * 3_000_000}]))
    assert error["code"] == "context_length_exceeded"


async def test_a_hopeless_text_is_refused_before_its_pictures_are_fetched(house: House) -> None:
    parts = [
        {"type": "image_url", "image_url": "data:x"},
        {"type": "text", "text": "x" * 100_000},
    ]
    assert error_of(await house.ask(**user(*parts)))["code"] == "context_length_exceeded"
    assert not house.media.parts


HOSTILE = "[" + "[]," * 200_000 + "[]]"


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", '
        f'"function": {{"name": "f", "parameters": {{"a": {HOSTILE}}}}}}}]}}',
        f'{{"messages": [{{"role": "user", "content": "x"}}], "metadata": {HOSTILE}}}',
        f'{{"messages": [{{"role": "user", "content": {HOSTILE}}}]}}',
        # the same, written so that the body itself has few commas and brackets
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", '
        '"arguments": "'
        + HOSTILE.replace("[", "\\u005b").replace("]", "\\u005d").replace(",", "\\u002c")
        + '"}}]}]}',
    ],
    ids=["tools", "ignored field", "content", "arguments"],
)
async def test_json_of_very_many_values_is_refused_unread(
    house: House, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """A few MB of "[]," cost seconds in which no stream could send."""
    sizes = []

    def read(text: Any) -> Any:
        sizes.append(text.count(b"[" if isinstance(text, bytes) else "["))
        return msgspec.json.Decoder().decode(text)

    monkeypatch.setattr(validate.msgspec.json, "decode", read)
    answer = await house.http.post("/v1/chat/completions", headers=JSON, content=body)
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"
    assert all(size < 100 for size in sizes)


@pytest.mark.parametrize("size", [10, 100_000])
async def test_the_work_on_long_tools_is_done_in_a_thread(
    house: House, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    here = []

    def noting(function: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            here.append(threading.get_ident() == threading.main_thread().ident)
            return function(*arguments)

        return noted

    for owner, name in (
        (routes, "parse_request"),
        (prepare, "read_conversation"),
        (tools, "describe"),
        (PromptBuilder, "build"),
    ):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    function = {"name": "look", "description": "\u00e4" * size}
    answer = await house.ask(messages=HELLO, tools=[{"type": "function", "function": function}])
    assert answer.status_code == (400 if size > 10 else 200)
    assert here == ([False] * 3 if size > 10 else [True] * 4)


async def test_a_body_that_is_too_large_is_413_announced_or_not(houses: Houses) -> None:
    house = await houses.open(max_request_bytes=2000)

    async def unannounced() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    for content in (b"x" * 3000, unannounced()):
        answer = await house.http.post("/v1/chat/completions", headers=JSON, content=content)
        assert answer.status_code == 413
        assert "2000" in error_of(answer)["message"]


async def test_keys_guard_everything_but_the_probes(houses: Houses) -> None:
    house = await houses.open(api_key=("first", "second"))
    for key in ("first", "second"):
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}):
            good = await house.http.get("/v1/models", headers=headers)
            assert good.status_code == 200
    wrong = {"Authorization": "Bearer firs"}, {"Authorization": "Basic first"}, {"X-Api-Key": "fir"}
    for headers in ({}, {"X-Api-Key": ""}, *wrong):
        for path in ("/v1/models", "/openapi.json", "/version", "/nowhere", "/v1/live", "/live/"):
            answer = await house.http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
    for path in ("/live", "/started", "/ready", "/health"):
        assert (await house.http.get(path)).status_code == 200
    assert (await house.http.get("/metrics")).status_code == 401
    house = await houses.open(api_key=("first",), open_metrics=True)
    assert (await house.http.get("/metrics")).status_code == 200
    assert (await house.http.get("/version")).status_code == 401


async def test_errors_of_anthropics_routes_have_anthropics_envelope(houses: Houses) -> None:
    house = await houses.open(api_key=("key",), max_request_bytes=2000)
    sent = {"X-Api-Key": "key", "X-Request-Id": "abc-1"}
    for path, headers, status, kind in (
        ("/v1/messages", {"X-Request-Id": "abc-1"}, 401, "authentication_error"),
        ("/v1/messages/nowhere", sent, 404, "not_found_error"),
        ("/v1/messages", sent | {"Content-Length": "2001"}, 413, "request_too_large"),
    ):
        answer = await house.http.post(path, headers=headers)
        assert answer.status_code == status
        body = answer.json()
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert body["request_id"] == answer.headers["request-id"] == "abc-1"
        assert len(answer.content) == int(answer.headers["content-length"])
    house.engine.state = "loading"
    answer = await house.http.post("/v1/messages", headers=sent)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["error"]["type"] == "overloaded_error"


async def test_request_ids_are_echoed_when_they_are_harmless(house: House) -> None:
    answer = await house.http.get("/live", headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for wrong in ("a b", "x" * 129, ""):
        answer = await house.http.get("/live", headers={"X-Request-Id": wrong})
        assert answer.headers["x-request-id"] not in (wrong, "")


async def test_an_engine_that_fails_at_once_is_500_even_for_a_stream(house: House) -> None:
    house.engine.script = lambda _: [EngineFailed("the engine failed during this request")]
    for stream in (False, True):
        answer = await house.ask(stream=stream)
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "engine_error"


async def test_an_error_after_the_first_byte_arrives_in_the_stream(house: House) -> None:
    house.engine.script = say("A red", finish="error")
    answer = await house.ask(stream=True)
    assert answer.status_code == 200
    *_, event, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    error = json.loads(event.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "details for the log" not in answer.text
    with pytest.raises(openai.APIError):
        async for _ in await house.sdk.chat.completions.create(
            model="tiny", messages=HELLO, stream=True
        ):
            pass
    answer = await house.ask()
    assert answer.status_code == 500
    assert "details" not in error_of(answer)["message"]


async def test_parameters_that_leave_nothing_to_begin_with_are_named(house: House) -> None:
    (word,) = encode_rendered("A")
    options = {"allowed_token_ids": [word, EOS], "bad_words": ["A"], "min_tokens": 1}
    answer = await house.ask(**options)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == "allowed_token_ids"
    assert "allowed_token_ids and bad_words and min_tokens" in error["message"]
    assert not house.engine.requests
    for less in options:
        answer = await house.ask(**{name: options[name] for name in options if name != less})
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_parameters_that_leave_nothing_to_go_on_with_are_the_requests_fault(
    house: House, stream: bool
) -> None:
    house.engine.script = say("A red", finish="stuck")
    answer = await house.ask(stream=stream)
    if stream:
        error = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400
        error = error_of(answer)
    assert error["code"] == "no_token_left"
    assert error["type"] == "invalid_request_error"


async def test_more_prompt_logprobs_than_are_reported_are_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MAX_PROMPT_LOGPROBS", 100)
    assert (await house.ask(prompt_logprobs=0)).status_code == 200
    answer = await house.ask(prompt_logprobs=20)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt_logprobs"
    assert "100" in error_of(answer)["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_exception_is_a_500_without_its_text(
    house: House, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    house.engine.script = lambda _: [RuntimeError("secret at 0x7f00")]
    answer = await house.ask(stream=stream)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert error_of(answer)["code"] == "internal_error"
    assert "secret" in caplog.text


NAMES = [
    *ChatRequest.model_fields,
    *ChatRequest.refused,
    *ChatRequest.ignored,
    "role",
    "content",
    "type",
    "text",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["user", "text", "image_url", "function", "auto", "<|im_end|>", "data:bad"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3).map(
        lambda extra: {"messages": HELLO} | extra
    ),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
            optional={
                "content": st.text(max_size=30)
                | VALUES
                | st.lists(
                    st.fixed_dictionaries(
                        {"type": st.sampled_from(["text", "image_url", "refusal"])},
                        optional={
                            "text": st.text(max_size=20),
                            "image_url": st.just("data:x") | VALUES,
                        },
                    ),
                    max_size=4,
                ),
                "tool_calls": VALUES,
            },
        ),
        max_size=4,
    ).map(lambda messages: {"messages": messages}),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
async def test_no_body_makes_the_server_fail(house: House, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    answer = await house.http.post("/v1/chat/completions", headers=JSON, content=content)
    assert answer.status_code < 500
    if answer.status_code != 200:
        error_of(answer)


async def test_an_engine_that_ends_without_a_reason_is_an_error(house: House) -> None:
    house.engine.script = lambda _: [[5]]
    assert (await house.ask()).status_code == 500
