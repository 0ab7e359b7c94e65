"""/v1/completions over ASGI: what the engine is asked, and what the official client reads."""

import asyncio
import itertools
import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion

from server.schemas.completion import MAX_TEXTS, CompletionRequest
from tests.api.conftest import House
from tests.api.test_chat import events
from tests.api.test_errors import error_of
from tests.fake_engine import EOS, say
from tests.small_tokenizer import encode_rendered, reference
from wire.errors import EngineFailed
from wire.messages import EngineOutput, EngineRequest, PromptLogprobs, TokenLogprobs

CONTEXT = encode_rendered("<IMG_CONTEXT>")[0]
TEMPLATE = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
NAMED = "<|im_start|>user<tool_call><box><|fim_prefix|>é</s><img></img>"


async def complete(house: House, prompt: Any = "What is", **options: Any) -> Any:
    return await house.http.post("/v1/completions", json={"prompt": prompt} | options)


def scored(*texts: str) -> Any:
    """Write ``texts``, each token as likely as its number says, and know the same of the prompt."""

    def script(request: EngineRequest) -> Any:
        prompt = None
        if request.sampling.prompt_logprobs >= 0:
            prompt = [
                PromptLogprobs(-0.25 * n, 3, [(CONTEXT, -0.1), (token, -0.25 * n)])
                for n, token in enumerate(request.prompt[1:], 1)
            ]
        for text in texts:
            ids = encode_rendered(text)
            likely = [TokenLogprobs(-0.5 * n, [(token, -0.5 * n)]) for n, token in enumerate(ids)]
            yield EngineOutput(request.id, ids, logprobs=likely, prompt_logprobs=prompt)
            prompt = None
        last = [TokenLogprobs(-9.0, [])]
        yield EngineOutput(request.id, [EOS], "stop", EOS, logprobs=last)

    return script


async def test_the_official_client_reads_a_whole_answer(house: House) -> None:
    answer = await house.sdk.completions.create(model="tiny", prompt="What is")
    assert answer.choices[0].text == "A red circle."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode_rendered("What is"))
    assert answer.usage.completion_tokens == len(encode_rendered("A red circle.")) + 1
    (request,) = house.engine.requests
    assert request.prompt == encode_rendered("What is")
    assert request.sampling.max_tokens == 16


async def test_answers_have_exactly_the_official_fields(house: House) -> None:
    house.engine.script = scored("A red", " circle")
    for options in ({}, {"logprobs": 1}):
        whole = (await complete(house, **options)).json()
        Completion.model_validate(whole, strict=True)
        assert set(whole) <= set(Completion.model_fields)
        streamed = await complete(house, **options, stream=True)
        for event in events(streamed.text):
            assert set(event) <= set(Completion.model_fields)
            assert "usage" not in event


async def test_prompts_of_every_kind_are_answered_in_their_order(house: House) -> None:
    def script(request: EngineRequest) -> Any:
        return say(reference().decode(request.prompt) + "!")(request)

    house.engine.script = script
    ids = encode_rendered("green")
    for prompt, texts in (
        ("red", ["red!"]),
        (ids, ["green!"]),
        (["red", "blue"], ["red!", "blue!"]),
        ([ids, ids], ["green!", "green!"]),
        (["red", ids], ["red!", "green!"]),
    ):
        answer = (await complete(house, prompt, n=2)).json()
        doubled = [text for text in texts for _ in range(2)]
        assert [choice["text"] for choice in answer["choices"]] == doubled
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(doubled)))
        pieces = dict.fromkeys(range(len(doubled)), "")
        stream = await house.sdk.completions.create(
            model="tiny", prompt=prompt, n=2, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            assert chunk.id
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
        assert list(pieces.values()) == doubled
        assert chunk.usage is not None
        assert chunk.usage.prompt_tokens == answer["usage"]["prompt_tokens"]


async def test_token_names_are_tokens_except_the_one_that_stands_for_pixels(house: House) -> None:
    await complete(house, TEMPLATE)
    await complete(house, NAMED)
    await complete(house, NAMED, parse_special=False)
    await complete(house, "<img><IMG_CONTEXT></img>")
    asked = [request.prompt for request in house.engine.requests]
    assert asked[:2] == [encode_rendered(TEMPLATE), encode_rendered(NAMED)]
    plain = reference()
    assert all(token < 500 for token in asked[2])
    assert plain.decode(asked[2], skip_special_tokens=False) == NAMED
    img, end = encode_rendered("<img></img>")
    assert (asked[3][0], asked[3][-1]) == (img, end)
    assert CONTEXT not in asked[3]
    assert plain.decode(asked[3][1:-1]) == "<IMG_CONTEXT>"


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": {}}, "prompt", "string"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt[1]", "empty"),
    ({"prompt": [[1], []]}, "prompt[1]", "empty"),
    ({"prompt": ["a", 1]}, "prompt[1]", "string or an array"),
    ({"prompt": [1, "a"]}, "prompt[1]", "token id"),
    ({"prompt": [True]}, "prompt[0]", "token id"),
    ({"prompt": [1, -1]}, "prompt[1]", "token id"),
    ({"prompt": [1, 2**40]}, "prompt[1]", "token id"),
    ({"prompt": [1.5]}, "prompt[0]", "string"),
    ({"prompt": [1, 100000]}, "prompt[1]", "less than"),
    ({"prompt": ["a", [1, 100000]]}, "prompt[1][1]", "less than"),
    ({"prompt": [1, CONTEXT]}, "prompt[1]", "picture"),
    ({"prompt": [[1], [1, 2, CONTEXT]]}, "prompt[1][2]", "picture"),
    ({"prompt": ["a"] * (MAX_TEXTS + 1)}, "prompt", "more than"),
    ({"prompt": ["a"] * (MAX_TEXTS // 2 + 1), "n": 2}, "prompt", "more than"),
    ({"prompt": "word " * 2000}, "prompt", "context"),
    ({"prompt": [1] * 600}, "prompt", "context"),
    ({"prompt": [1] * 500, "max_tokens": 100}, "max_tokens", "context"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "not supported"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"model": "other"}, "model", "does not serve"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "both"),
    ({"priority": 1}, "priority", "priority"),
]


@pytest.mark.parametrize(("body", "param", "says"), WRONG)
async def test_what_is_wrong_is_named(
    house: House, body: dict[str, Any], param: str, says: str
) -> None:
    answer = await house.http.post("/v1/completions", json={"prompt": "Hello"} | body)
    error = error_of(answer)
    assert answer.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert says in error["message"]
    assert not house.engine.requests


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = [*CompletionRequest.model_fields, *CompletionRequest.refused]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=4), JUNK)
async def test_junk_is_answered_or_refused_by_name(
    house: House, body: dict[str, Any], prompt: Any
) -> None:
    answer = await house.http.post(
        "/v1/completions",
        content=msgspec.json.encode({"prompt": prompt} | body),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 400:
        assert error_of(answer)["param"]


async def test_the_neutral_values_of_refused_fields_are_fine(house: House) -> None:
    for name, values in CompletionRequest.refused.items():
        for value in (None, *values):
            assert (await complete(house, **{name: value})).status_code == 200


async def test_every_token_says_where_its_text_begins(house: House) -> None:
    house.engine.script = scored("你😀", "<ref>red")
    for echo, hidden in itertools.product((False, True), repeat=2):
        answer = await complete(
            house, "naïve 😀x", echo=echo, logprobs=1, skip_special_tokens=hidden
        )
        (choice,) = answer.json()["choices"]
        text, found = choice["text"], choice["logprobs"]
        assert text == ("naïve 😀x" if echo else "") + ("你😀red" if hidden else "你😀<ref>red")
        assert len(found["tokens"]) == len(found["text_offset"]) == len(found["top_logprobs"])
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            if not token.startswith("bytes:") and not (hidden and token == "<ref>"):
                assert text[offset : offset + len(token)] == token
        assert any(token.startswith("bytes:\\x") for token in found["tokens"])
        assert found["text_offset"] == sorted(found["text_offset"])


async def test_an_echo_is_scored_like_the_answer(house: House) -> None:
    house.engine.script = scored("red circle")
    prompt = "What is"
    ids = encode_rendered(prompt)
    (choice,) = (await complete(house, prompt, echo=True, logprobs=1)).json()["choices"]
    assert house.engine.requests[0].sampling.prompt_logprobs == 1
    found = choice["logprobs"]
    said = encode_rendered("red circle")
    assert found["tokens"] == [token_text(token) for token in (*ids, *said)]
    assert found["token_logprobs"][: len(ids)] == [None, *(-0.25 * n for n in range(1, len(ids)))]
    assert found["token_logprobs"][len(ids) :] == [-0.5 * n for n in range(len(said))]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1] == {"<IMG_CONTEXT>": -0.1, token_text(ids[1]): -0.25}
    assert found["top_logprobs"][-1] == {token_text(said[-1]): -0.5 * (len(said) - 1)}
    # Without an echo nothing is asked of the prompt, and its scores can be asked for alone.
    (choice,) = (await complete(house, prompt, logprobs=1)).json()["choices"]
    assert choice["logprobs"]["tokens"] == [token_text(token) for token in said]
    assert house.engine.requests[1].sampling.prompt_logprobs == -1
    (choice,) = (await complete(house, prompt, prompt_logprobs=0)).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(ids[1])]["logprob"] == -0.25


def token_text(token: int) -> str:
    return str(reference().decode([token], skip_special_tokens=False))


async def test_a_prompt_of_one_token_can_be_scored(house: House) -> None:
    house.engine.script = scored("!")
    (choice,) = (await complete(house, [1], echo=True, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, 0.0]


async def test_no_tokens_are_generated_where_none_are_wanted(house: House) -> None:
    house.engine.script = scored("red")
    for stream in (False, True):
        answer = await complete(
            house, ["What", "is"], max_tokens=0, echo=True, logprobs=0, stream=stream
        )
        found = events(answer.text) if stream else [answer.json()]
        choices = [choice for each in found for choice in each["choices"]]
        assert {choice["text"] for choice in choices} - {""} == {"What", "is"}
        tokens = [choice["logprobs"]["tokens"] for choice in choices if choice["logprobs"]]
        assert sum(map(len, tokens)) == sum(len(encode_rendered(text)) for text in ("What", "is"))
        assert {choice["finish_reason"] for choice in choices} - {None} == {"length"}
    assert house.engine.requests[0].sampling.max_tokens == 1
    usage = (await complete(house, "What", max_tokens=0)).json()["usage"]
    assert usage["completion_tokens"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": True},
        {"logprobs": 1, "n": 2},
        {"logprobs": 0, "n": 3, "echo": True},
        {"echo": True, "logprobs": 2, "stop": ["cir"]},
        {"return_token_ids": True, "n": 2, "stop": ["cir"]},
        {"prompt_logprobs": 1, "include_stop_str_in_output": True, "stop": "red"},
    ],
)
async def test_a_stream_is_the_whole_answer_in_pieces(house: House, options: Any) -> None:
    house.engine.script = scored("A red", " circle and 你", " é.")
    prompt = ["naïve", encode_rendered("是 Yes"), NAMED]
    whole = (await complete(house, prompt, **options)).json()
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    *chunks, last = events((await complete(house, prompt, **options, **usage)).text)
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        for name in ("token_ids", "prompt_token_ids"):
            ids = [c[name] for c in mine if name in c]
            assert list(itertools.chain(*ids)) == choice.get(name, [])
            assert bool(ids) == ("return_token_ids" in options)
        for name in choice["logprobs"] or ():
            pieces = [c["logprobs"][name] for c in mine if c["logprobs"]]
            assert list(itertools.chain(*pieces)) == choice["logprobs"][name]
        prompts = [c["prompt_logprobs"] for c in mine if "prompt_logprobs" in c]
        assert prompts == [choice[name] for name in ("prompt_logprobs",) if name in choice]


async def test_all_ids_are_told_those_of_the_end_too(house: House) -> None:
    house.engine.script = scored("A red", " circle")
    options = {"prompt": ["What", "is"], "return_token_ids": True}
    said = [*encode_rendered("A red"), *encode_rendered(" circle")]
    for choice, prompt in zip(
        (await complete(house, **options)).json()["choices"], options["prompt"], strict=True
    ):
        assert choice["prompt_token_ids"] == encode_rendered(prompt)
        assert choice["token_ids"] == [*said, EOS]
    (choice,) = (await complete(house, return_token_ids=True, max_tokens=0)).json()["choices"]
    assert choice["token_ids"] == []
    whole = (await house.ask(return_token_ids=True)).json()
    assert whole["prompt_token_ids"] == house.engine.requests[-1].prompt
    assert whole["choices"][0]["token_ids"] == [*said, EOS]
    chunks = events((await house.ask(return_token_ids=True, stream=True)).text)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    told = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert told == [*said, EOS]
    assert sum("prompt_token_ids" in chunk for chunk in chunks) == 1


async def test_equal_prompts_draw_on_their_own_unless_they_have_a_seed(house: House) -> None:
    await complete(house, ["A", "A"])
    await complete(house, ["A", "A"], seed=5)
    seeds = [request.sampling.seed for request in house.engine.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [5, 5]


async def test_one_prompt_that_fails_ends_the_others(house: House) -> None:
    never = asyncio.Event()

    def script(request: EngineRequest) -> Any:
        failing = request.prompt == encode_rendered("B")
        return [EngineFailed("The engine failed.")] if failing else [never]

    house.engine.script = script
    answer = await complete(house, ["A", "B", "C"])
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "engine_error"
    assert len(house.engine.aborted) == 2


async def test_a_grammar_holds_a_completion_too(house: House) -> None:
    answer = await complete(house, guided_choice=["red", "blue"])
    assert answer.status_code == 200
    grammar = house.engine.requests[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "choice"


async def test_unlikely_tokens_have_a_number_that_json_can_write(house: House) -> None:
    (token,) = encode_rendered("!")
    house.engine.script = lambda request: [
        EngineOutput(
            request.id, [token, EOS], "stop", EOS, logprobs=[TokenLogprobs(-math.inf, [])] * 2
        )
    ]
    (choice,) = (await complete(house, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"!": -9999.0}]
