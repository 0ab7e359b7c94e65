"""Answers, whole and streamed, through the official client and as bytes."""

import asyncio
import itertools
import json
import math
import random
import re
from collections.abc import Iterable
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.conftest import House, Houses
from tests.fake_engine import CHAT, EOS, FakeEngine, Step, make_ready, say
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineOutput, EngineRequest, PromptLogprobs, TokenLogprobs
from wire.sampling import MAX_SEED

HELLO: Any = [{"role": "user", "content": "Hello!"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def picture(name: str, detail: str = "auto") -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{name}", "detail": detail},
    }


async def test_the_official_client_reads_a_whole_answer(house: House) -> None:
    answer = await house.sdk.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "A red circle."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny"
    assert answer.object == "chat.completion"
    prompt = len(encode_rendered("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len(encode_rendered("A red circle.")) + 1
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens


async def test_the_official_client_reads_a_stream(house: House) -> None:
    stream = await house.sdk.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "A red circle."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_whole_and_streamed_answers_have_exactly_the_official_fields(house: House) -> None:
    whole = (await house.ask()).json()
    ChatCompletion.model_validate(whole, strict=True)
    assert set(whole) <= set(ChatCompletion.model_fields)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        for event in events((await house.ask(stream=True, **options)).text):
            ChatCompletionChunk.model_validate(event, strict=True)
            assert set(event) <= set(ChatCompletionChunk.model_fields)
            assert ("usage" in event) == bool(options)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; checks the form around it."""
    *parts, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


async def test_a_stream_is_these_bytes(house: House) -> None:
    house.engine.script = lambda request: [
        encode_rendered("Yes"),
        encode_rendered("."),
        EngineOutput(request.id, [EOS], "stop", EOS),
    ]
    answer = await house.ask(stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    text = re.sub(
        r'"id":"chatcmpl-[0-9a-f]{32}","created":\d+', '"id":"ID","created":0', answer.text
    )
    head = 'data: {"id":"ID","created":0,"model":"tiny","choices":[{"delta":'
    tail = '}],"object":"chat.completion.chunk"}\n\n'
    rest = '"index":0,"logprobs":null,"finish_reason":'
    deltas = ['{"role":"assistant","content":""}', '{"content":"Yes"}', '{"content":"."}']
    assert text == (
        "".join(f"{head}{delta},{rest}null{tail}" for delta in deltas)
        + f'{head}{{}},{rest}"stop"{tail}data: [DONE]\n\n'
    )


async def test_text_and_pictures_keep_their_order_and_earlier_turns_their_pictures(
    house: House,
) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [picture("a"), {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A circle."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And"},
                picture("b", "low"),
                {"type": "text", "text": "beside"},
                picture("a"),
            ],
        },
    ]
    answer = await house.ask(messages=messages)
    assert answer.status_code == 200
    context = "<IMG_CONTEXT>" * 3
    (request,) = house.engine.requests
    assert request.prompt == encode_rendered(
        "<|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>user\n<img>{context * 2}</img>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA circle.<|im_end|>\n"
        f"<|im_start|>user\nAnd<img>{context}</img>\nbeside<img>{context * 2}</img>\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [item.tiles for item in request.items] == [2, 1, 2]
    # The picture that is shown twice travels once.
    assert [item.buffer for item in request.items] == [0, 1, 0]
    assert [len(buffer) for buffer in house.engine.buffers[0]] == [2 * 48, 48]
    assert [part.param for part in house.media.parts] == [
        "messages[1].content[0].image_url.url",
        "messages[3].content[1].image_url.url",
        "messages[3].content[3].image_url.url",
    ]
    assert answer.json()["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "image_tokens": 15,
    }


async def test_the_original_format_has_its_sentence_and_numbers_pictures(houses: Houses) -> None:
    house = await houses.open(FakeEngine(make_ready(CHAT)))
    content = [picture("a"), picture("b", "low"), {"type": "text", "text": "Compare."}]
    await house.ask(messages=[{"role": "user", "content": content}])
    context = "<IMG_CONTEXT>" * 3
    assert house.engine.requests[0].prompt == encode_rendered(
        f"<|im_start|>system\n{CHAT.system}<|im_end|>\n"
        f"<|im_start|>user\nImage-1: <img>{context * 2}</img>\nImage-2: <img>{context}</img>\n"
        "Compare.<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_the_operators_choice_of_system_and_labels_wins(houses: Houses) -> None:
    house = await houses.open(
        FakeEngine(make_ready(CHAT)), system_prompt="Be kind.", image_labels="never"
    )
    await house.ask(messages=[{"role": "user", "content": [picture("a", "low")] * 2}])
    context = "<img>" + "<IMG_CONTEXT>" * 3 + "</img>\n"
    assert house.engine.requests[0].prompt == encode_rendered(
        f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{context * 2}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_sampling_fields_reach_the_engine(house: House) -> None:
    await house.ask(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3, max_tokens=5, stop_token_ids=[9]
    )
    (request,) = house.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, sampling.max_tokens) == (0.1, -3, 5)
    assert sampling.stop_token_ids == (*make_ready().eos_token_ids, 9)


async def test_what_shapes_the_logits_reaches_the_engine(house: House) -> None:
    await house.ask(
        presence_penalty=-1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={"7": -100, "8": 0.5},
        min_tokens=3,
        allowed_token_ids=[7, 8],
        bad_words=["dog", " cat"],
        cache_salt="tenant",
    )
    (request,) = house.engine.requests
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.5, 0.5)
    assert (sampling.repetition_penalty, sampling.min_tokens) == (1.2, 3)
    assert sampling.logit_bias == ((7, -100.0), (8, 0.5))
    assert sampling.allowed_token_ids == (7, 8)
    spellings = ("dog", " dog", " cat")
    assert sampling.bad_words == tuple(tuple(encode_rendered(text)) for text in spellings)
    assert request.cache_salt == b"tenant"


async def test_what_is_not_given_comes_from_the_checkpoint_and_the_context(house: House) -> None:
    await house.ask(top_k=-1)
    await house.ask(ignore_eos=True)
    first, second = house.engine.requests
    assert first.sampling.temperature == 0  # do_sample is false in this checkpoint
    assert first.sampling.top_k == 0
    assert first.sampling.max_tokens == 512 - len(first.prompt)
    assert first.sampling.seed != second.sampling.seed
    assert second.sampling.stop_token_ids == ()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_engines_work(
    house: House, stream: bool
) -> None:
    answer = await house.ask(stop=["cir", "never"], stream=stream)
    if stream:
        chunks = events(answer.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        choice = chunks[-1]["choices"][0]
    else:
        choice = answer.json()["choices"][0]
        text = choice["message"]["content"]
    assert (text, choice["finish_reason"]) == ("A red ", "stop")
    assert choice["stop_reason"] == "cir"
    assert house.engine.aborted == [house.engine.requests[0].id]


async def test_what_stopped_the_answer_is_shown_when_asked_for(house: House) -> None:
    assert content(await house.ask(stop="cir", include_stop_str_in_output=True)) == "A red cir"
    (dot,) = encode_rendered(".")
    house.engine.script = lambda request: [
        encode_rendered("Yes"),
        EngineOutput(request.id, [dot], "stop", dot),
    ]
    answer = await house.ask(stop_token_ids=[dot], include_stop_str_in_output=True)
    assert content(answer) == "Yes."
    assert answer.json()["choices"][0]["stop_reason"] == dot


async def test_no_stop_string_counts_before_min_tokens(house: House) -> None:
    house.engine.script = say("red red red.")
    first = len(encode_rendered("red"))
    assert content(await house.ask(stop="red")) == ""
    assert content(await house.ask(stop="red", min_tokens=first + 1)) == "red "


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (
            "naïve 🙂 red circle, 你是 café",
            {"stop": ["你是 x"], "logprobs": True, "top_logprobs": 1},
        ),
        ("red red circle red", {"stop": ["cir", "le"], "logprobs": True}),
        ("red red red.", {"stop": "red", "min_tokens": 4}),
        (f"Well. {CALL}\n{CALL} and", {"tools": [WEATHER], "parallel_tool_calls": False}),
        (f"{CALL}\n{CALL}", {"tools": [WEATHER], "logprobs": True}),
        ("a <ref>b</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> c", {"stop": "5"}),
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_an_answer_is_the_same_however_its_tokens_arrive(
    house: House, text: str, body: dict[str, Any], finish: str
) -> None:
    """A reader that is slow gets several tokens at once."""
    ids = [*encode_rendered(text), *([EOS] if finish == "stop" else [])]

    def arriving(ends: list[int]) -> None:
        def script(request: EngineRequest) -> Iterable[Step]:
            for begin, end in itertools.pairwise([0, *ends, len(ids)]):
                likely = [TokenLogprobs(-float(n), [(n, -1.0)]) for n in range(begin, end)]
                last = finish if end == len(ids) else None
                stop = EOS if last == "stop" else None
                yield EngineOutput(request.id, ids[begin:end], last, stop, logprobs=likely)

        house.engine.script = script

    async def answers() -> list[object]:
        """Whole, and put together again from a stream."""
        whole = (await house.ask(**body)).json()
        (choice,) = whole["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        options = body | {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events((await house.ask(**options)).text)
        deltas = [part["delta"] for chunk in chunks for part in chunk["choices"]]
        streamed: Any = {"name": [], "arguments": [], "content": [], "boxes": []}
        for delta in deltas:
            for call in delta.get("tool_calls", ()):
                for key, value in call["function"].items():
                    streamed[key].append(value)
            streamed["content"].append(delta.get("content", ""))
            streamed["boxes"] += delta.get("boxes", ())
        likely = [p["logprobs"]["content"] for c in chunks for p in c["choices"] if p["logprobs"]]
        assert "".join(streamed["content"]) == (choice["message"]["content"] or "")
        assert "".join(streamed["arguments"]) == "".join(call["arguments"] for call in calls)
        assert streamed["boxes"] == choice["message"].get("boxes", [])
        assert list(itertools.chain(*likely)) == (choice["logprobs"] or {}).get("content", [])
        assert chunks[-1]["usage"] == whole["usage"]
        message = {**choice["message"], "tool_calls": calls}
        return [message, choice["finish_reason"], choice["logprobs"], whole["usage"]]

    arriving(list(range(1, len(ids))))
    one_by_one = await answers()
    draw = random.Random(text)
    for count in (0, 1, 2, len(ids) // 2):
        arriving(sorted(draw.sample(range(1, len(ids)), count)))
        assert await answers() == one_by_one


@pytest.mark.parametrize("stream", [False, True])
async def test_every_token_of_the_answer_has_its_logprobs(house: House, stream: bool) -> None:
    """Also the tokens whose bytes are held back; not the one that ended the answer."""
    ids = encode_rendered("aé🙂!")
    house.engine.script = lambda request: [
        *(
            EngineOutput(
                request.id,
                [token],
                logprobs=[TokenLogprobs(-0.5 * n, [(token, -0.5 * n), (ids[0], -math.inf)])],
            )
            for n, token in enumerate(ids)
        ),
        EngineOutput(request.id, [EOS], "stop", EOS, logprobs=[TokenLogprobs(-9.0, [])]),
    ]
    messages: Any = [{"role": "user", "content": "Hello!"}]
    options: Any = {"model": "tiny", "messages": messages, "logprobs": True, "top_logprobs": 2}
    create = house.sdk.chat.completions.create
    if stream:
        chunks = [chunk async for chunk in await create(stream=True, **options)]
        found = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
        entries = [entry for part in found for entry in part.content or ()]
    else:
        whole = (await create(**options)).choices[0].logprobs
        assert whole is not None
        entries = whole.content or []
    assert house.engine.requests[0].sampling.logprobs == 2
    assert b"".join(bytes(entry.bytes or ()) for entry in entries) == "aé🙂!".encode()
    assert [entry.logprob for entry in entries] == [-0.5 * n for n in range(len(ids))]
    assert {entry.top_logprobs[1].logprob for entry in entries} == {-9999.0}
    assert [entry.top_logprobs[0].token for entry in entries] == [e.token for e in entries]


async def test_without_being_asked_for_there_are_no_logprobs(house: House) -> None:
    answer = (await house.ask(logprobs=False)).json()
    assert answer["choices"][0]["logprobs"] is None
    assert house.engine.requests[0].sampling.logprobs == -1


def numbered(request: EngineRequest) -> Iterable[Step]:
    """Every choice says its number, and which seed it has."""
    number = request.id.partition("-")[2].partition("-")[2] or "0"
    return say(f"{number} {request.sampling.seed}")(request)


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_come_with_their_index_and_seeds_in_a_row(
    house: House, stream: bool
) -> None:
    house.engine.script = numbered
    answer = await house.ask(n=3, seed=41, stream=stream, stream_options={"include_usage": True})
    texts = ["", "", ""]
    if stream:
        parts = events(answer.text)
        for chunk in parts:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        usage = parts[-1]["usage"]
        ends = [c["index"] for p in parts for c in p["choices"] if c["finish_reason"]]
        assert sorted(ends) == [0, 1, 2]
    else:
        body = answer.json()
        for choice in body["choices"]:
            texts[choice["index"]] = choice["message"]["content"]
            assert choice["finish_reason"] == "stop"
        usage = body["usage"]
    assert texts == ["0 41", "1 42", "2 43"]
    assert usage["prompt_tokens"] == len(house.engine.requests[0].prompt)
    assert usage["completion_tokens"] == sum(len(encode_rendered(t)) + 1 for t in texts)
    assert not house.engine.aborted


async def test_seeds_wrap_at_the_end_of_their_range(house: House) -> None:
    await house.ask(n=2, seed=MAX_SEED)
    assert [r.sampling.seed for r in house.engine.requests] == [MAX_SEED, -MAX_SEED - 1]


async def test_the_other_choices_start_when_the_prompt_is_computed(house: House) -> None:
    gate = asyncio.Event()
    house.engine.script = lambda request: [gate, *say("Yes")(request)]
    task = asyncio.create_task(house.ask(n=4))
    while not house.engine.requests:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(house.engine.requests) == 1
    gate.set()
    assert len((await task).json()["choices"]) == 4


async def test_a_stop_string_ends_its_own_choice_only(house: House) -> None:
    house.engine.script = lambda request: say("no" if request.id.endswith("-1") else "yes")(request)
    answer = (await house.ask(n=3, stop="n")).json()
    assert [c["message"]["content"] for c in answer["choices"]] == ["yes", "", "yes"]
    assert house.engine.aborted == [house.engine.requests[1].id]


async def test_a_choice_that_fails_fails_the_request_and_frees_the_others(house: House) -> None:
    endless = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Step]:
        if request.id.endswith("-1"):
            return say("", finish="error")(request)
        return [*encode_one("Yes"), endless]

    house.engine.script = script
    answer = await house.ask(n=3)
    assert answer.status_code == 500
    names = [request.id for request in house.engine.requests]
    assert sorted(house.engine.aborted) == sorted([names[0], names[2]])


def encode_one(text: str) -> list[list[int]]:
    return [[token] for token in encode_rendered(text)]


async def test_a_stop_token_of_the_client_is_not_part_of_the_text(house: House) -> None:
    (dot,) = encode_rendered(".")
    house.engine.script = lambda request: [
        encode_rendered("Yes"),
        EngineOutput(request.id, [dot], "stop", dot),
    ]
    answer = (await house.ask(stop_token_ids=[dot])).json()
    assert answer["choices"][0]["message"]["content"] == "Yes"
    assert answer["usage"]["completion_tokens"] == len(encode_rendered("Yes")) + 1


async def test_a_character_split_over_tokens_arrives_whole(house: House) -> None:
    house.engine.script = say("naïve 🙂 \u9fa5!")
    chunks = events((await house.ask(stream=True)).text)
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "naïve 🙂 \u9fa5!"
    assert not any("\ufffd" in text for text in texts)


async def test_special_tokens_are_shown_only_when_asked_for(house: House) -> None:
    house.engine.script = say("<ref>dog</ref>")
    assert content(await house.ask()) == "dog"
    assert content(await house.ask(skip_special_tokens=False)) == "<ref>dog</ref>"


def content(answer: Any) -> Any:
    return answer.json()["choices"][0]["message"]["content"]


async def test_a_length_limit_is_reported_as_length(house: House) -> None:
    house.engine.script = say("A red", finish="length", cached=16)
    answer = (await house.ask(max_completion_tokens=2)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 16


async def test_the_official_client_gets_tool_calls_whole_and_streamed(house: House) -> None:
    house.engine.script = say(f"Let me look.\n{CALL}\n{CALL}")
    answer = await house.sdk.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert choice.message.tool_calls is not None
    first, second = choice.message.tool_calls
    assert first.type == "function"
    assert (first.function.name, first.function.arguments) == ("get_weather", '{"city": "Paris"}')
    assert first.id != second.id

    stream = house.sdk.chat.completions.stream(model="tiny", messages=HELLO, tools=[WEATHER])
    async with stream as source:
        final = await source.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.content == "Let me look."
    calls = final.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "get_weather"]


async def test_one_call_at_a_time_ends_after_the_first(house: House) -> None:
    house.engine.script = say(f"{CALL}\n{CALL}")
    answer = (await house.ask(tools=[WEATHER], parallel_tool_calls=False)).json()
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["content"] is None
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert house.engine.aborted


async def test_without_tools_or_with_choice_none_a_call_is_text(house: House) -> None:
    house.engine.script = say(CALL)
    assert content(await house.ask()) == CALL
    assert content(await house.ask(tools=[WEATHER], tool_choice="none")) == CALL
    assert all(len(request.prompt) < 50 for request in house.engine.requests)


async def test_a_malformed_call_stays_text(house: House) -> None:
    house.engine.script = say("<tool_call>\nget weather!\n</tool_call>")
    answer = (await house.ask(tools=[WEATHER])).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == "<tool_call>\nget weather!\n</tool_call>"


async def test_tokens_and_answers_are_counted(house: House) -> None:
    await house.ask()
    await house.ask(messages=[{"role": "user", "content": [picture("a")]}])
    for probe in ("/ready", "/live", "/metrics"):  # not counted
        await house.http.get(probe)
    page = (await house.http.get("/metrics")).text
    assert 'internvl_http_requests_total{status="200"} 2.0' in page
    assert 'internvl_request_success_total{finished_reason="stop"} 2.0' in page
    assert "internvl_request_media_time_seconds_count 1.0" in page
    assert "internvl_time_to_first_token_seconds_count 2.0" in page
    assert "internvl_requests_in_flight 0.0" in page
    assert "internvl_num_requests_running 1.0" in page
    assert "internvl_kv_blocks_used 3.0" in page
    sizes = [len(request.prompt) for request in house.engine.requests]
    assert f"internvl_prompt_tokens_total {float(sum(sizes))}" in page


async def test_models_are_listed_and_found_by_name(house: House) -> None:
    assert [model.id async for model in house.sdk.models.list()] == ["tiny"]
    model = await house.sdk.models.retrieve("tiny")
    assert (model.id, model.object) == ("tiny", "model")
    assert (await house.http.get("/v1/models/tiny")).json()["max_model_len"] == 512


async def test_the_openapi_page_describes_the_chat_request(house: House) -> None:
    page = (await house.http.get("/openapi.json")).json()
    chat = page["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "top_k"} <= set(chat)
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(page))
    assert "Message" in references
    assert set(references) <= set(page["components"]["schemas"])


PREFILL: Any = [*HELLO, {"role": "assistant", "content": "The answer"}]


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": True}, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "<|im_end|>\n"),
        ({"continue_final_message": True}, ""),
        ({"continue_final_message": True, "add_generation_prompt": False}, ""),
    ],
)
async def test_a_prompt_ends_as_it_is_asked_to(
    house: House, options: dict[str, Any], ending: str
) -> None:
    await house.ask(messages=PREFILL, **options)
    (request,) = house.engine.requests
    assert request.prompt == encode_rendered(
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nThe answer" + ending
    )


async def test_an_empty_message_is_continued_as_if_it_were_asked_for(house: House) -> None:
    empty = {"role": "assistant", "content": ""}
    await house.ask(messages=[*HELLO, empty], continue_final_message=True)
    await house.ask(messages=HELLO)
    continued, asked = house.engine.requests
    assert continued.prompt == asked.prompt


@pytest.mark.parametrize("n", [1, 2])
async def test_echo_repeats_the_assistants_last_message(house: House, n: int) -> None:
    options = {"messages": PREFILL, "continue_final_message": True, "echo": True, "n": n}
    whole = (await house.ask(**options)).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [
        "The answerA red circle."
    ] * n
    streamed = events((await house.ask(**options, stream=True)).text)
    for index in range(n):
        choices = [event["choices"][0] for event in streamed]
        deltas = [choice["delta"] for choice in choices if choice["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[1] == {"content": "The answer"}
    assert whole["usage"]["completion_tokens"] == n * (len(encode_rendered("A red circle.")) + 1)
    plain = (await house.ask(messages=HELLO, echo=True)).json()
    assert plain["choices"][0]["message"]["content"] == "A red circle."


async def test_log_probabilities_of_the_prompt_come_once_by_token_id(house: House) -> None:
    def script(request: EngineRequest) -> Iterable[Step]:
        scores = [
            PromptLogprobs(-math.inf, 9, [(token, -0.5), (7, -1.0)])
            if at % 2
            else PromptLogprobs(-2.0, 3, [(7, -0.5), (8, -1.0)])
            for at, token in enumerate(request.prompt[1:])
        ]
        asked = request.sampling.prompt_logprobs >= 0
        word = encode_rendered("Yes")
        yield EngineOutput(request.id, word, prompt_logprobs=scores if asked else None)
        yield EngineOutput(request.id, [EOS], "stop", EOS)

    house.engine.script = script
    whole = (await house.ask(prompt_logprobs=2, n=2)).json()
    asked = [request.sampling.prompt_logprobs for request in house.engine.requests]
    assert asked == [2, -1]
    prompt = house.engine.requests[0].prompt
    found = whole["prompt_logprobs"]
    assert len(found) == len(prompt)
    assert found[0] is None
    token = str(prompt[1])
    assert list(found[1]) == [token, "7", "8"]
    assert found[1][token] == {"logprob": -2.0, "rank": 3, "decoded_token": "user"}
    assert [place["rank"] for place in found[1].values()] == [3, 1, 2]
    assert found[2][str(prompt[2])]["logprob"] == -9999.0
    assert len(found[2]) == 2
    streamed = events((await house.ask(prompt_logprobs=2, stream=True)).text)
    assert [event.pop("prompt_logprobs", None) for event in streamed] == [
        found,
        *[None] * (len(streamed) - 1),
    ]
    assert "prompt_logprobs" not in (await house.ask()).json()
