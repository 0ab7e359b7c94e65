"""Prompts that end otherwise, and prompts that are scored, on the demo model over HTTP."""

from typing import Any

import httpx
import pytest

from demo import CHECKPOINT
from server.tokenizer import Tokenizer
from tests.servers import Server, draw, part

TOKENS = Tokenizer.load(CHECKPOINT)
QUESTIONS = [
    ["Hello!"],
    [draw("red", "circle"), "What is in this picture?"],
    [draw("blue", "square", (300, 200)), "What shape is this and what colour is it?"],
]


def ask(server: Server, *messages: Any, **options: Any) -> dict[str, Any]:
    body = {"messages": messages, "temperature": 0, "max_tokens": 48} | options
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def user(content: list[Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part(item) for item in content]}


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_an_answer_that_is_continued_goes_on_as_it_would_have(
    demo_server: Server, number: int
) -> None:
    """At every border between two tokens whose text has the same tokens again."""
    question = user(QUESTIONS[number])
    whole = ask(demo_server, question, logprobs=True)
    (choice,) = whole["choices"]
    text, entries = choice["message"]["content"], choice["logprobs"]["content"]
    pieces = [bytes(entry["bytes"]) for entry in entries]
    assert b"".join(pieces).decode() == text
    ids = TOKENS.encode(text)
    borders = [
        count
        for count in range(1, len(pieces))
        if TOKENS.encode(b"".join(pieces[:count]).decode()) == ids[:count]
    ]
    assert len(borders) > 2
    for count in borders:
        beginning = {"role": "assistant", "content": b"".join(pieces[:count]).decode()}
        options = {"continue_final_message": True, "max_tokens": 48 - count}
        rest = ask(demo_server, question, beginning, **options)
        assert beginning["content"] + rest["choices"][0]["message"]["content"] == text
        assert rest["choices"][0]["finish_reason"] == choice["finish_reason"]
        # Nothing stands between the question's template and these tokens.
        assert rest["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] + count
        echoed = ask(demo_server, question, beginning, **options, echo=True)
        assert echoed["choices"][0]["message"]["content"] == text


def test_a_generated_answer_is_as_likely_as_it_was_when_it_is_part_of_the_prompt(
    demo_server: Server,
) -> None:
    question = user(["Hello!"])
    (choice,) = ask(demo_server, question, logprobs=True, top_logprobs=2)["choices"]
    entries = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert len(TOKENS.encode(text)) == len(entries) > 0
    for options in ({}, {"cache_salt": "another"}):
        again = ask(
            demo_server,
            question,
            {"role": "assistant", "content": text},
            continue_final_message=True,
            max_tokens=2,
            prompt_logprobs=2,
            **options,
        )
        scored = again["prompt_logprobs"]
        assert len(scored) == again["usage"]["prompt_tokens"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert scored[0] is None
        for token, entry, place in zip(
            TOKENS.encode(text), entries, scored[-len(entries) :], strict=True
        ):
            own = place[str(token)]
            assert own["logprob"] == pytest.approx(entry["logprob"], abs=1e-4)
            assert own["decoded_token"] == entry["token"]
            assert own["rank"] == 1
            assert len(place) == 2


def test_seeded_choices_are_seeded_requests(demo_server: Server) -> None:
    question = user(["Tell me something."])
    options = {"temperature": 2.0, "max_tokens": 24, "ignore_eos": True}
    together = ask(demo_server, question, n=4, seed=11, **options)["choices"]
    texts = [choice["message"]["content"] for choice in together]
    alone = [ask(demo_server, question, seed=11 + k, **options)["choices"][0] for k in range(4)]
    assert texts == [choice["message"]["content"] for choice in alone]
    assert len(set(texts)) > 1


def test_an_answer_that_cannot_go_on_is_the_requests_own_fault(demo_server: Server) -> None:
    token = TOKENS.encode("a")[0]
    body = {
        "messages": [user(["Hello!"])],
        "allowed_token_ids": [token],
        "bad_words": ["aaa"],
        "ignore_eos": True,
    }
    assert TOKENS.encode("aaa") == [token] * 3, "otherwise this test is about something else"
    answer = httpx.post(demo_server.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_token_left"
    demo_server.wait_for_metric("internvl_kv_blocks_used", 0)
