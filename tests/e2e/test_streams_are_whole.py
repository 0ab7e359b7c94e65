"""A stream of the demo model, put together as the official clients do it, is its answer without
streaming, in all four APIs."""

import itertools
import json
from typing import Any

import httpx
import pytest

from tests.api import test_streams_are_whole as api
from tests.servers import Server

SCHEMA = {
    "type": "object",
    "properties": {"room": {"type": "string"}, "color": {"type": "string"}},
    "required": ["room", "color"],
}
LIGHT: Any = {"name": "set_light", "description": "Set the colour of a lamp", "parameters": SCHEMA}
LAMP: Any = {"role": "user", "content": "Make the light in the kitchen yellow."}
TOOL: Any = {"type": "function", "function": LIGHT}
FORM: Any = {"name": "a", "schema": SCHEMA}
CUT: dict[str, Any] = {"max_tokens": 7, "ignore_eos": True, "skip_special_tokens": False}
CASES: list[tuple[str, Any, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "/v1/chat/completions",
        api.check_chat,
        {"messages": [LAMP]},
        [
            {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 30},
            {"tools": [TOOL]},
            {"tools": [TOOL], "tool_choice": "required", "logprobs": True, "top_logprobs": 2},
            {"response_format": {"type": "json_schema", "json_schema": FORM}},
            {"response_format": {"type": "internvl_boxes"}, "max_tokens": 40},
            {"logprobs": True, "prompt_logprobs": 1, "return_token_ids": True, "stop": ["a"]},
            CUT,
        ],
    ),
    (
        "/v1/completions",
        api.check_completions,
        {"prompt": "A red"},
        [
            {"n": 2, "temperature": 1.0, "seed": 5},
            {"prompt": ["A red", "é🙂"], "echo": True},
            {"prompt": "é🙂", "echo": True, "logprobs": 2},
            {"max_tokens": 0, "echo": True},
            CUT,
        ],
    ),
    (
        "/v1/responses",
        api.check_responses,
        {"input": LAMP["content"]},
        [
            {"tools": [{"type": "function", **LIGHT}], "top_logprobs": 2},
            {"text": {"format": {"type": "json_schema", **FORM}}},
            {"max_output_tokens": 7, "ignore_eos": True},
        ],
    ),
    (
        "/v1/messages",
        api.check_messages,
        {"messages": [LAMP], "max_tokens": 60},
        [
            {"tools": [{"name": "set_light", "input_schema": SCHEMA}]},
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"stop_sequences": ["a"]},
            CUT,
        ],
    ),
]


@pytest.mark.parametrize(("path", "check", "asked", "options"), CASES, ids=[c[0] for c in CASES])
def test_a_stream_of_the_model_is_its_whole_answer(
    demo_server: Server, path: str, check: Any, asked: dict[str, Any], options: list[dict[str, Any]]
) -> None:
    salts = map(str, itertools.count())
    for option in options:
        body = {"temperature": 0, **asked, **option}

        def post(body: Any = body, **more: Any) -> str:
            # Nothing is found in the cache: usage would tell.
            salt = f"{path} {next(salts)}"
            answer = httpx.post(
                demo_server.url + path, json=body | more | {"cache_salt": salt}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            return answer.text

        whole = json.loads(post())
        text = post(stream=True, stream_options={"include_usage": True})
        datas = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        check(whole, [json.loads(data) for data in datas if data != "[DONE]"])
