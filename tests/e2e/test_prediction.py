"""Answers that were predicted, on the demo model: the same in fewer steps, whatever is asked of
them, though many of their tokens come at once."""

import itertools
import json
from typing import Any

import httpx
import pytest

from demo import CHECKPOINT
from server.tokenizer import Tokenizer
from tests.api.test_streams_are_whole import alike, check_chat
from tests.servers import Server, draw, part

SALTS = itertools.count()
# "I am a small demo model of InternVL Server. I can name, count and locate simple shapes ..."
ABLE = ("What can you do?",)
MODEL = Tokenizer.load(CHECKPOINT).encode(" model")
OPTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (ABLE, {"logprobs": True, "top_logprobs": 2}),
    ((draw("red", "circle"), "What is this?"), {}),
    (ABLE, {"stop": ["emo m"]}),
    (ABLE, {"stop": ["Server. I can n", "rver. I can name"], "logprobs": True}),
    (ABLE, {"stop": [" small "], "include_stop_str_in_output": True, "return_token_ids": True}),
    (ABLE, {"stop_token_ids": MODEL, "return_token_ids": True, "logprobs": True}),
    (ABLE, {"max_tokens": 8, "return_token_ids": True, "logprobs": True}),
    (ABLE, {"ignore_eos": True, "max_tokens": 40, "skip_special_tokens": False}),
    (ABLE, {"n": 3, "seed": 3, "temperature": 0.3, "logprobs": True}),
    (ABLE, {"best_of": {"n": 2}, "seed": 3, "temperature": 0.3}),
    (ABLE, {"min_tokens": 12, "stop": ["I"], "frequency_penalty": 0.1}),
]


def ask(server: Server, body: dict[str, Any], *, stream: bool = False) -> tuple[Any, float]:
    """The answer, or the chunks of a stream, and how many steps the engine took."""
    steps = []
    # What is left of other requests takes no step any more.
    server.wait_for_metric("internvl_num_requests_running", 0)
    steps.append(server.metric("internvl_engine_steps_total"))
    more: dict[str, Any] = {"cache_salt": f"prediction {next(SALTS)}"}  # usage tells what is cached
    if stream:
        more |= {"stream": True, "stream_options": {"include_usage": True}}
    found = httpx.post(server.url + "/v1/chat/completions", json=body | more, timeout=60)
    assert found.status_code == 200, found.text
    steps.append(server.metric("internvl_engine_steps_total"))
    lines = [line[6:] for line in found.text.split("\n") if line.startswith("data: {")]
    answer = [json.loads(line) for line in lines] if stream else found.json()
    for each in answer if stream else [answer]:
        (each["usage"] or {}).pop("internvl", None)  # how long a picture took
    return answer, steps[1] - steps[0]  # type: ignore[operator]


def nearly(answer: Any) -> Any:
    """But for the last bits of its numbers: more rows at once are added up in another order."""
    if isinstance(answer, float):
        return pytest.approx(answer, abs=1e-3)
    if isinstance(answer, list):
        return [nearly(entry) for entry in answer]
    if isinstance(answer, dict):
        return {name: nearly(entry) for name, entry in answer.items()}
    return answer


@pytest.mark.parametrize(("content", "options"), OPTIONS)
def test_an_answer_that_was_predicted_is_the_same_in_fewer_steps(
    demo_server: Server, content: tuple[Any, ...], options: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": [part(item) for item in content]}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 64}
    whole, _ = ask(demo_server, body)
    text = whole["choices"][0]["message"]["content"]
    expected, steps = ask(demo_server, body | options)
    body |= options | {"prediction": {"type": "content", "content": text}}
    found, fewer = ask(demo_server, body)
    chunks, fewest = ask(demo_server, body, stream=True)
    assert alike(found) == nearly(alike(expected))
    if "best_of" not in options:  # which comes in one piece
        check_chat(found, chunks)
    if "stop" not in options:  # behind one the engine goes on until it hears of it
        assert max(fewer, fewest) < steps


def test_a_prediction_that_does_not_come_does_no_harm(demo_server: Server) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": ABLE[0]}], "temperature": 0}
    expected, _ = ask(demo_server, body)
    for text in ("I am<|im_end|> a small I am a large I", " can" * 5000, "<box>\u0301 I I I"):
        found, _ = ask(demo_server, body | {"prediction": {"type": "content", "content": text}})
        assert alike(found) == nearly(alike(expected))
