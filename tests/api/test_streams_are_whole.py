"""Whatever a request asks for and whatever the model writes, however its tokens arrive: a stream,
put together as the official clients do it, is the answer without streaming, field by field. Only
ids and times differ."""

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.api.conftest import House
from tests.fake_engine import EOS, Script, Step
from tests.small_tokenizer import encode_rendered, reference
from wire.messages import EngineOutput, EngineRequest, PromptLogprobs, TokenLogprobs

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é🙂", "n": [1, 2]}}\n</tool_call>'
PIECES = [
    *("A red circle. ", "STOP", "ST", "OP", " ", "\n", "é", "🙂", "👩\u200d👧", "你是", "e\u0301"),
    *(CALL, CALL[:30], "<tool_call>", "</tool_call>", '{"a": "🙂"}', "\\u00e9", "<|im_start|>"),
    *("<ref>cup</ref><box>[[1, 2, 30, 40]]</box>", "<box>", "<box>[[1, 2], [x]]</box>"),
]
# A token for each byte: no text has to be valid, or to end with a whole character.
BYTES = [
    token
    for name, token in sorted(reference().get_vocab().items())
    if len(name) == 1 and not name.isascii()
]
written = st.lists(
    st.one_of(
        st.sampled_from(PIECES).map(encode_rendered),
        st.text(max_size=6).map(encode_rendered),
        st.lists(st.sampled_from(BYTES), min_size=1, max_size=3),
    ),
    max_size=8,
).map(lambda pieces: list(itertools.chain(*pieces)))
ends = st.sampled_from([("stop", EOS), ("stop", encode_rendered("red")[0]), ("length", None)])


def writes(tokens: Sequence[int], end: tuple[str, int | None], seed: int) -> Script:
    """``tokens``, of each choice a little less, in pieces of any size."""
    draw = random.Random(seed)

    def likely(token: int) -> TokenLogprobs:
        return TokenLogprobs(-token / 8, [(token, -token / 8), (EOS, -50.0)])

    def script(request: EngineRequest) -> Iterable[Step]:
        last, stop = end
        choice = int(request.id.rpartition("-")[2]) if "-" in request.id[-3:] else 0
        ids = [*tokens[choice:], *([] if stop is None else [stop])]
        prompt = None
        if request.sampling.prompt_logprobs >= 0:
            prompt = [PromptLogprobs(-1.0, 3, [(EOS, -0.1), (t, -1.0)]) for t in request.prompt[1:]]
        at = 0
        while at < len(ids) - 1:
            size = draw.randint(1, min(4, len(ids) - 1 - at))
            scores = [*map(likely, ids[at : at + size])]
            yield EngineOutput(request.id, ids[at : at + size], None, None, 2, None, scores, prompt)
            at, prompt = at + size, None
        scores = [*map(likely, ids[at:])]
        yield EngineOutput(request.id, ids[at:], last, stop, 2, None, scores, prompt)

    return script


def some(*groups: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of these, together."""

    def together(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for group in chosen for name, value in group.items()}

    return st.lists(st.sampled_from(groups), max_size=5).map(together)


SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
FUNCTION = {"name": "look", "parameters": SCHEMA}
USER = {"role": "user", "content": "Hello!"}
GOES_ON = {"messages": [USER, {"role": "assistant", "content": "I see é"}]}
RED = encode_rendered("red")[:1]

COMMON: list[dict[str, Any]] = [
    {"skip_special_tokens": False},
    {"include_stop_str_in_output": True},
    {"min_tokens": 3},
    {"ignore_eos": True, "stop_token_ids": RED},
    {"stop_token_ids": RED},
]
STOPS = [["STOP"], ["TOP", "🙂"], ["circle. ", "\ufffd"], ["é"]]
LIST = [{"type": "function", "function": FUNCTION}]
CHAT = some(
    *COMMON,
    *({"stop": stop} for stop in STOPS),
    {"n": 3},
    {"tools": LIST},
    {"tools": LIST, "tool_choice": "required"},
    {"tools": LIST, "tool_choice": "none"},
    {"tools": LIST, "tool_choice": LIST[0] | {"function": {"name": "look"}}},
    {"tools": LIST, "parallel_tool_calls": False},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"response_format": {"type": "internvl_boxes"}},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"prompt_logprobs": 1},
    {"return_token_ids": True},
    GOES_ON | {"echo": True, "add_generation_prompt": False},
    GOES_ON | {"continue_final_message": True, "add_generation_prompt": False},
    GOES_ON | {"continue_final_message": True, "add_generation_prompt": False, "echo": True},
)
COMPLETIONS = some(
    *COMMON,
    *({"stop": stop} for stop in STOPS),
    {"prompt": ["Once", "é🙂"]},
    {"prompt": [5, 6]},
    {"prompt": [*BYTES[150:170], 5]},
    {"n": 2},
    {"max_tokens": 0},
    {"logprobs": 0},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"return_token_ids": True},
    {"echo": True},
    {"echo": True, "logprobs": 1},
    {"response_format": {"type": "json_object"}},
    {"suffix": "x"},
)
TOOL = {"type": "function", **FUNCTION}
RESPONSES = some(
    *COMMON,
    *({"stop": stop} for stop in STOPS),
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "name": "look"}},
    {"tools": [TOOL], "parallel_tool_calls": False},
    {"text": {"format": {"type": "json_object"}}},
    {"top_logprobs": 2},
    {"include": ["message.output_text.logprobs"]},
    {"instructions": "Be short.", "metadata": {"a": "b"}},
    {"store": False},
)
CLIENTS = {"name": "look", "input_schema": SCHEMA}
MESSAGES = some(
    *COMMON,
    *({"stop_sequences": stop} for stop in STOPS),
    {"tools": [CLIENTS]},
    {"tools": [CLIENTS], "tool_choice": {"type": "any"}},
    {"tools": [CLIENTS], "tool_choice": {"type": "none"}},
    {"tools": [CLIENTS], "tool_choice": {"type": "tool", "name": "look"}},
    {"tools": [CLIENTS], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    {"system": "Be short."},
    GOES_ON,
)

# Ends of lines for some, but no ends of an event's lines.
LINES = encode_rendered("a\u2028b\u2029c\x85d")
# The first byte of a character.
HALF = encode_rendered("🙂")[0]
CALLED = {"tools": [TOOL], "top_logprobs": 2}

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
Told = list[dict[str, Any]]


async def both(
    house: House, path: str, body: Any, tokens: list[int], end: Any, seed: int
) -> tuple[Any, Told] | None:
    """The whole answer and the events of a stream; None if both are refused in the same words."""
    house.engine.script = writes(tokens, end, seed)
    whole = await house.http.post(path, json=body)
    house.engine.script = writes(tokens, end, seed + 1)  # in other pieces
    options: dict[str, Any] = {"include_usage": True, "resumable": bool(seed % 2)}
    streamed = await house.http.post(path, json=body | {"stream": True, "stream_options": options})
    assert streamed.status_code == whole.status_code, (whole.text, streamed.text)
    if whole.status_code != 200:
        assert whole.status_code == 400
        assert streamed.json()["error"] == whole.json()["error"]
        return None
    lines = streamed.text.splitlines()  # as httpx does it, and clients that use it
    datas = [line[6:] for line in lines if line.startswith("data: ")]
    return whole.json(), [json.loads(data) for data in datas if data != "[DONE]"]


def alike(value: Any) -> Any:
    """Without what differs between two answers of one request, and without empty lists and nulls:
    a stream has nothing to say of what is not there."""
    if isinstance(value, list):
        return [alike(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    apart = {"id", "created", "object", "created_at", "completed_at", "item_id", "call_id"}
    # OpenAI's client parses what it has put together, and remembers the place of each call.
    apart |= {"parsed", "parsed_arguments"}
    kept = {name: alike(entry) for name, entry in value.items() if name not in apart}
    return {name: entry for name, entry in kept.items() if entry not in (None, [], "")}


def joined(chunks: Told, fields: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Of each choice, what no client puts together: lists grow, the last of other values counts."""
    found: dict[int, dict[str, Any]] = {}
    for part in itertools.chain(*(chunk["choices"] for chunk in chunks)):
        own = found.setdefault(part["index"], {})
        for name in fields:
            if isinstance(part.get(name), list):
                own[name] = own.get(name, []) + part[name]
            elif part.get(name) is not None:
                own[name] = part[name]
    return found


def check_chat(whole: Any, chunks: Told) -> None:
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    folded = state.current_completion_snapshot.to_dict()
    ours = joined(chunks, ("token_ids", "stop_reason"))
    for choice in folded["choices"]:  # type: ignore[attr-defined]
        choice |= ours[choice["index"]]
        for call in choice["message"].get("tool_calls") or ():
            del call["index"]
    for name in ("prompt_token_ids", "prompt_logprobs"):
        if name in chunks[0]:
            folded[name] = chunks[0][name]
    assert alike(folded) == alike(whole)


@FEW
@example({"n": 3}, encode_rendered("A red circle."), ("length", None), 0)
@example({}, LINES, ("length", None), 0)
@given(body=CHAT, tokens=written, end=ends, seed=st.integers(0, 9))
async def test_chat(house: House, body: Any, tokens: list[int], end: Any, seed: int) -> None:
    found = await both(
        house, "/v1/chat/completions", {"messages": [USER]} | body, tokens, end, seed
    )
    if found is not None:
        check_chat(*found)


def check_completions(whole: Any, chunks: Told) -> None:
    parts = {choice["index"]: choice for choice in whole["choices"]}
    folded = joined(chunks, ("token_ids", "stop_reason", "finish_reason", "prompt_token_ids"))
    assert folded.keys() == parts.keys()
    for index, choice in folded.items():
        own = [p for chunk in chunks for p in chunk["choices"] if p["index"] == index]
        choice |= {"index": index, "text": "".join(part["text"] for part in own)}
        likely = [part["logprobs"] for part in own if part["logprobs"]]
        if likely:
            choice["logprobs"] = {
                name: list(itertools.chain(*(one[name] for one in likely))) for name in likely[0]
            }
        if "prompt_logprobs" in own[0]:
            choice["prompt_logprobs"] = own[0]["prompt_logprobs"]
        assert alike(choice) == alike(parts[index])
        _check_offsets(choice)
    assert chunks[-1]["usage"] == whole["usage"]


@FEW
@example({"logprobs": 0}, [HALF, *encode_rendered("A red")], ("length", None), 0)
@example({"prompt": [HALF, 5], "echo": True, "logprobs": 0}, RED, ("length", None), 0)
@example({}, LINES, ("length", None), 1)
@given(body=COMPLETIONS, tokens=written, end=ends, seed=st.integers(0, 9))
async def test_completions(house: House, body: Any, tokens: list[int], end: Any, seed: int) -> None:
    found = await both(house, "/v1/completions", {"prompt": "Once"} | body, tokens, end, seed)
    if found is not None:
        check_completions(*found)


def _check_offsets(choice: Any) -> None:
    """Whatever bytes there are, a token that is text stands where it is said to be."""
    likely = choice.get("logprobs")
    if likely and choice["finish_reason"] == "length":  # else a stop may hide the last ones
        for token, offset in zip(likely["tokens"], likely["text_offset"], strict=True):
            shown = choice["text"][offset : offset + len(token)]
            assert shown == token or token.startswith(("bytes:", "<"))


def check_responses(whole: Any, events: Told) -> None:
    official: Any = TypeAdapter(ResponseStreamEvent)
    state: Any = ResponseStreamState(input_tools=[], text_format=omit)
    for event in events:
        state.handle_event(official.validate_python(event))
    assert alike(events[-1]["response"]) == alike(whole)
    shown = [
        [part.text for part in item.content] if item.type == "message" else item.arguments
        for _, item in sorted(state._output_items.items())
    ]
    assert shown == [
        [part["text"] for part in item["content"]] if "content" in item else item["arguments"]
        for item in whole["output"]
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert alike(done) == alike(whole["output"])


@FEW
@example(CALLED, encode_rendered(f"A red. {CALL} So."), ("length", None), 0)
@example({}, LINES, ("length", None), 0)
@given(body=RESPONSES, tokens=written, end=ends, seed=st.integers(0, 9))
async def test_responses(house: House, body: Any, tokens: list[int], end: Any, seed: int) -> None:
    found = await both(house, "/v1/responses", {"input": "Hello!"} | body, tokens, end, seed)
    if found is not None:
        check_responses(*found)


def check_messages(whole: Any, events: Told) -> None:
    folded: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            folded = accumulate_event(
                event=event,  # type: ignore[arg-type]
                current_snapshot=folded,
                json_bufs=buffers,
            )
    assert alike(folded.to_dict()) == alike(whole)
    start = events[0]["message"]["usage"]
    assert start == whole["usage"] | {"output_tokens": 0}


@FEW
@example({}, LINES, ("length", None), 1)
@given(body=MESSAGES, tokens=written, end=ends, seed=st.integers(0, 9))
async def test_messages(house: House, body: Any, tokens: list[int], end: Any, seed: int) -> None:
    asked = {"max_tokens": 50, "messages": [USER]} | body
    found = await both(house, "/v1/messages", asked, tokens, end, seed)
    if found is not None:
        check_messages(*found)
