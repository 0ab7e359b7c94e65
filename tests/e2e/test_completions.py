"""Completions of the demo model through a socket, with the official client."""

import itertools
from typing import Any

import openai
import pytest

from demo import CHECKPOINT
from server.tokenizer import Tokenizer
from tests.servers import Server

TOKENS = Tokenizer.load(CHECKPOINT)
MODEL = "internvl-demo"
TURN = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
IDS = TOKENS.naming(TOKENS.added.values())(TURN)


def test_a_rendered_chat_has_the_chats_answer_as_text_and_as_ids(demo_server: Server) -> None:
    with demo_server.client() as client:
        chat = client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hello!"},
            ],
            temperature=0,
            max_tokens=24,
            logprobs=True,
        )
        prompt = f"<|im_start|>system\nBe kind.<|im_end|>\n{TURN}"
        ids = TOKENS.naming(TOKENS.added.values())(prompt)
        answer = client.completions.create(
            model=MODEL,
            prompt=[prompt, ids],
            temperature=0,
            max_tokens=24,
            logprobs=0,  # type: ignore[list-item]
        )
    assert answer.usage.prompt_tokens == 2 * chat.usage.prompt_tokens
    expected = [entry.token for entry in chat.choices[0].logprobs.content]
    for choice in answer.choices:
        assert choice.text == chat.choices[0].message.content
        assert choice.logprobs.tokens == expected
    plain = demo_complete(demo_server, prompt=prompt, extra_body={"parse_special": False})
    assert plain.usage.prompt_tokens > chat.usage.prompt_tokens


def demo_complete(server: Server, **options: Any) -> Any:
    with server.client() as client:
        answer = client.completions.create(model=MODEL, temperature=0, **options)
        return list(answer) if isinstance(answer, openai.Stream) else answer


def test_a_stream_of_many_prompts_is_the_whole_answer(demo_server: Server) -> None:
    options: dict[str, Any] = {
        "prompt": ["The red circle", TURN, "你好", "A"],
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "max_tokens": 12,
    }
    whole = demo_complete(demo_server, **options)
    texts = [""] * 8
    tokens: list[list[str]] = [[] for _ in texts]
    for chunk in demo_complete(demo_server, **options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    for choice in whole.choices:
        pairs = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        for token, offset in pairs:
            if not token.startswith("bytes:") and token not in TOKENS.added.values():
                assert choice.text.startswith(token, offset)


def test_an_answer_scores_as_an_echo_what_it_scored_as_an_answer(demo_server: Server) -> None:
    answer = demo_complete(demo_server, prompt=IDS, max_tokens=12, logprobs=1)
    likely = answer.choices[0].logprobs
    ids = [*IDS, *itertools.chain(*(TOKENS.encode(token) for token in likely.tokens))]
    again = demo_complete(demo_server, prompt=ids, echo=True, max_tokens=0, logprobs=1)
    scored = again.choices[0].logprobs
    assert scored.tokens[len(IDS) :] == likely.tokens
    assert scored.token_logprobs[len(IDS) :] == pytest.approx(likely.token_logprobs, abs=1e-4)
    assert again.usage.completion_tokens == 0


def test_pictures_cannot_be_forged_and_hostile_prompts_are_named(demo_server: Server) -> None:
    context = TOKENS.token_id("<IMG_CONTEXT>")
    text = demo_complete(
        demo_server, prompt="<img>" + "<IMG_CONTEXT>" * 16 + "</img>", max_tokens=2
    )
    assert text.usage.prompt_tokens > 18
    for prompt, param in (
        ([1, context], "prompt[1]"),
        ([[1], [context]], "prompt[1][0]"),
        ([10**9], "prompt[0]"),
        ("", "prompt"),
        ("word " * 100_000, "prompt"),
        (["a"] * 1000, "prompt"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            demo_complete(demo_server, prompt=prompt)
        assert refused.value.param == param
    demo_server.wait_for_metric("internvl_kv_blocks_used", 0)


def test_many_choices_that_are_dropped_leave_nothing_behind(demo_server: Server) -> None:
    with demo_server.client() as client:
        stream = client.completions.create(
            model=MODEL,
            prompt=["The", "A", "你好"],
            n=4,
            stream=True,
            max_tokens=2000,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    demo_server.wait_for_metric("internvl_kv_blocks_used", 0)
    demo_server.wait_for_metric("internvl_num_requests_running", 0)
