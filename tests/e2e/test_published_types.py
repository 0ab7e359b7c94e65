"""Real answers of the demo model against the types that OpenAI and Anthropic publish with their
clients, which are made from their own descriptions: every field of the right type, nothing besides
but what is listed here."""

import base64
import json
import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic.types import (
    DeletedFile,
    ErrorResponse,
    FileMetadata,
    Message,
    MessageTokensCount,
    ModelInfo,
    RawMessageStreamEvent,
)
from openai.types import Completion, FileDeleted, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import InputTokenCountResponse, Response, ResponseStreamEvent
from openai.types.shared import ErrorObject
from pydantic import TypeAdapter

from tests.servers import Server, data_uri, draw, encode

PNG = encode(draw("red", "circle"))
WHAT = "What is in this picture?"
SHOWN = {"type": "image_url", "image_url": {"url": data_uri(PNG)}}
PICTURE = [{"role": "user", "content": [SHOWN, {"type": "text", "text": WHAT}]}]
LAMP = [{"role": "user", "content": "Make the light in the kitchen yellow."}]
PARAMETERS = {
    "type": "object",
    "properties": {"room": {"type": "string"}, "color": {"type": "string"}},
    "required": ["room", "color"],
    "additionalProperties": False,
}
FUNCTION = {"name": "set_light", "parameters": PARAMETERS}
LIGHT = {"type": "function", "function": FUNCTION}
ANTHROPIC = {"anthropic-version": "2023-06-01", "anthropic-beta": "files-api-2025-04-14"}
ANTHROPICS_PICTURE = {
    "type": "image",
    "source": {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(PNG).decode(),
    },
}


def theirs(value: Any, ours: set[str], found: set[str]) -> Any:
    """``value`` without the fields that are ``ours``; which were there is added to ``found``."""
    if isinstance(value, list):
        return [theirs(each, ours, found) for each in value]
    if not isinstance(value, dict):
        return value
    found |= ours & value.keys()
    return {name: theirs(each, ours, found) for name, each in value.items() if name not in ours}


def check(kind: Any, value: Any, ours: str = "") -> None:
    """Raise for what is not ``kind``, without the fields named in ``ours``, which must be there."""
    found: set[str] = set()
    text = json.dumps(theirs(value, set(ours.split()), found))
    TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    assert found == set(ours.split())


@pytest.fixture
def http(demo_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        yield client


def kinds(union: Any) -> dict[str, Any]:
    """The members of a published union by their "type"; one is easier to read about than all."""
    members = typing.get_args(typing.get_args(union)[0])
    return {typing.get_args(each.model_fields["type"].annotation)[0]: each for each in members}


def post(http: httpx.Client, path: str, body: Any, **headers: str) -> Any:
    answer = http.post(path, json={"temperature": 0} | body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str, body: Any, **headers: str) -> list[Any]:
    body = {"temperature": 0, "stream": True} | body
    with http.stream("POST", path, json=body, headers=headers) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line[:5] == "data:"]
    return [json.loads(line) for line in lines if line != "[DONE]"]


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": PICTURE}, "image_tokens internvl"),
    ({"messages": PICTURE, "n": 2, "stop": ["red"]}, "image_tokens internvl stop_reason"),
    ({"messages": LAMP, "tools": [LIGHT]}, "image_tokens"),
    ({"messages": LAMP, "tools": [LIGHT], "tool_choice": "required"}, "image_tokens"),
    ({"messages": LAMP, "logprobs": True, "top_logprobs": 2}, "image_tokens"),
    ({"messages": LAMP, "max_tokens": 1}, "image_tokens"),
    (
        {"messages": LAMP, "response_format": {"type": "json_object"}, "max_tokens": 30},
        "image_tokens",
    ),
]


@pytest.mark.parametrize(("body", "ours"), CHATS)
def test_chat_completions(http: httpx.Client, body: Any, ours: str) -> None:
    check(ChatCompletion, post(http, "/v1/chat/completions", body), ours)
    body = body | {"stream_options": {"include_usage": True}}
    chunks = events(http, "/v1/chat/completions", body)
    assert len(chunks) > 2
    check(list[ChatCompletionChunk], chunks, ours)


def described(completion: Any) -> Any:
    """Without what OpenAI sends too and its types forget: no finish reason in the middle of a
    stream, and no log-probability of a prompt's first token."""
    for choice in completion["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, none in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if choice["logprobs"] and choice["logprobs"]["text_offset"][0] == 0:
                choice["logprobs"][name][0] = choice["logprobs"][name][0] or none
    return completion


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Hello"},
        {"prompt": ["Hello", "What"], "n": 2, "logprobs": 2, "echo": True},
    ],
)
def test_completions(http: httpx.Client, body: Any) -> None:
    check(Completion, described(post(http, "/v1/completions", body)), "image_tokens")
    for chunk in events(http, "/v1/completions", body):
        check(Completion, described(chunk))


RESPONSE_EVENTS = kinds(ResponseStreamEvent)
RESPONSES: list[Any] = [
    {"input": "Hello!", "metadata": {"a": "b"}, "instructions": "Be kind."},
    {"input": "Hello!", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"input": "Hello!", "max_output_tokens": 1},
    {
        "input": LAMP,
        "tools": [{"type": "function", "strict": True, **FUNCTION}],
        "tool_choice": "required",
    },
    {
        "input": LAMP,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}},
        "max_output_tokens": 40,
    },
]


def besides(event: Any) -> str:
    """What an event has of ours, or of OpenAI's other descriptions."""
    if event["type"] == "response.function_call_arguments.done":
        return "name"  # which the types have had
    if "response" in event:
        return "store image_tokens" if event["response"]["usage"] else "store"
    return "bytes" if event.get("logprobs") else ""


@pytest.mark.parametrize("body", RESPONSES)
def test_responses(http: httpx.Client, body: Any) -> None:
    whole = post(http, "/v1/responses", body)
    # OpenAI tells "store" too; its types do not.
    check(Response, whole, "store image_tokens")
    check(Response, http.get(f"/v1/responses/{whole['id']}").json(), "store image_tokens")
    told = events(http, "/v1/responses", body)
    assert len(told) > 5
    for event in told:
        check(RESPONSE_EVENTS[event["type"]], event, besides(event))
    counted = {name: body[name] for name in body if name in ("input", "tools", "instructions")}
    answer = http.post("/v1/responses/input_tokens", json=counted)
    check(InputTokenCountResponse, answer.json())


def test_a_response_about_a_picture(http: httpx.Client) -> None:
    shown = {"type": "input_image", "image_url": data_uri(PNG), "detail": "auto"}
    body = {"input": [{"role": "user", "content": [shown, {"type": "input_text", "text": WHAT}]}]}
    check(Response, post(http, "/v1/responses", body), "internvl store image_tokens")


MESSAGE_EVENTS = kinds(RawMessageStreamEvent)
MESSAGES: list[Any] = [
    {
        "messages": [
            {"role": "user", "content": [ANTHROPICS_PICTURE, {"type": "text", "text": WHAT}]}
        ]
    },
    {"messages": LAMP, "stop_sequences": ["e"]},
    {"messages": LAMP, "tools": [{"name": "set_light", "input_schema": PARAMETERS}]},
    {"messages": LAMP, "max_tokens": 1},
]


@pytest.mark.parametrize("body", MESSAGES)
def test_messages(http: httpx.Client, body: Any) -> None:
    body = {"max_tokens": 60} | body
    check(Message, post(http, "/v1/messages", body, **ANTHROPIC))
    told = events(http, "/v1/messages", body, **ANTHROPIC)
    assert len(told) > 4
    for event in told:
        if event["type"] != "ping":  # which their client leaves out
            check(MESSAGE_EVENTS[event["type"]], event)
    counted = {name: body[name] for name in ("messages", "tools") if name in body}
    answer = http.post("/v1/messages/count_tokens", json=counted, headers=ANTHROPIC)
    check(MessageTokensCount, answer.json())


def test_models(http: httpx.Client) -> None:
    """One object for the clients of both."""
    (model,) = http.get("/v1/models").json()["data"]
    both = {"id", "max_model_len"}
    anthropics = (model.keys() & ModelInfo.model_fields) - both
    check(Model, model, " ".join({"max_model_len"} | anthropics))
    openais = (model.keys() & Model.model_fields) - both
    check(ModelInfo, model, " ".join({"max_model_len"} | openais))
    assert http.get(f"/v1/models/{model['id']}").json() == model


def test_files(http: httpx.Client) -> None:
    sent: Any = {"files": {"file": ("a.png", PNG, "image/png")}}
    made = http.post("/v1/files", data={"purpose": "vision"}, **sent).json()
    check(FileObject, made)
    check(list[FileObject], http.get("/v1/files").json()["data"])
    check(FileDeleted, http.delete(f"/v1/files/{made['id']}").json())
    made = http.post("/v1/files", headers=ANTHROPIC, **sent).json()
    check(FileMetadata, made)
    check(list[FileMetadata], http.get("/v1/files", headers=ANTHROPIC).json()["data"])
    check(DeletedFile, http.delete(f"/v1/files/{made['id']}", headers=ANTHROPIC).json())


WRONG: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", {"messages": LAMP, "model": "gpt"}),
    ("POST", "/v1/chat/completions", {"messages": []}),
    ("POST", "/v1/embeddings", {}),
    ("GET", "/v1/responses/resp_1", None),
    ("DELETE", "/v1/models", None),
]


@pytest.mark.parametrize(("method", "path", "body"), WRONG)
def test_errors(http: httpx.Client, method: str, path: str, body: Any) -> None:
    answer = http.request(method, path, json=body)
    assert answer.status_code >= 400
    assert answer.json().keys() == {"error"}
    check(ErrorObject, answer.json()["error"])
    other = http.request(method, path, json=body, headers=ANTHROPIC).json()
    check(ErrorResponse, other, "details")
