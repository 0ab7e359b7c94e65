"""``prediction``: what a client expects of an answer reaches the engine as tokens, and nothing else
depends on it."""

import threading
from array import array
from typing import Any

import msgspec
import pytest

from server.chat.prompt import PromptBuilder
from server.routes.body import THREAD_BYTES
from tests.api.conftest import House, Houses
from tests.api.test_errors import check_refusal
from tests.fake_engine import FakeEngine, make_ready, say
from tests.small_tokenizer import encode_rendered, reference
from wire.messages import EngineRequest, pack

HELLO: Any = [{"role": "user", "content": "Hello!"}]
TEXT = "A red circle, 你是 café.\n"


def content(value: Any) -> dict[str, Any]:
    return {"prediction": {"type": "content", "content": value}}


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def predicted(request: EngineRequest) -> list[int]:
    return array("i", request.prediction).tolist()


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (TEXT, encode_rendered(TEXT)),
        (parts(TEXT), encode_rendered(TEXT)),
        # One text: no token ends where a part does.
        (parts("A re", "d circ", "le"), encode_rendered("A red circle")),
        ("", []),
        ([], []),
    ],
    ids=["text", "part", "parts", "no text", "no part"],
)
async def test_all_of_it_reaches_the_engine_and_nothing_else_differs(
    house: House, value: Any, ids: list[int]
) -> None:
    options = {"seed": 7, "cache_salt": "a"}
    plain, other = [await house.ask(**options, **more) for more in ({}, content(value))]
    assert other.status_code == 200
    assert other.json()["usage"] == plain.json()["usage"]
    without, asked = [msgspec.structs.replace(each, id="") for each in house.engine.requests]
    assert asked.prediction == pack(ids)
    assert msgspec.structs.replace(asked, prediction=b"") == without


async def test_where_nobody_asks_for_it_it_is_not_read(houses: Houses) -> None:
    house = await houses.open(FakeEngine(make_ready(speculates=False)))
    assert (await house.ask(**content(TEXT))).status_code == 200
    assert house.engine.requests[0].prediction == b""


async def test_null_is_none(house: House) -> None:
    assert (await house.ask(prediction=None)).status_code == 200
    assert house.engine.requests[0].prediction == b""


@pytest.mark.parametrize(
    ("value", "param", "says"),
    [
        ("A red", "prediction", "an object with a 'type'"),
        ([], "prediction", "an object with a 'type'"),
        (True, "prediction", "an object with a 'type'"),
        ({}, "prediction.type", "missing; supported is 'content'"),
        ({"content": "A red"}, "prediction.type", "missing; supported is 'content'"),
        ({"type": "tokens", "content": "A"}, "prediction.type", "'tokens'; supported is 'content'"),
        ({"type": 1, "content": "A"}, "prediction.type", "'1'; supported is 'content'"),
        ({"type": "content"}, "prediction.content", "missing"),
        ({"type": "content", "content": None}, "prediction.content", "string or an array of parts"),
        ({"type": "content", "content": 5}, "prediction.content", "string or an array of parts"),
        (content({"type": "text", "text": "A"})["prediction"], "prediction.content", "a string or"),
        (content(["A"])["prediction"], "prediction.content[0]", "an object with a 'type'"),
        (content([{"text": "A"}])["prediction"], "prediction.content[0].type", "missing"),
        (
            content([*parts("A"), {"type": "image_url", "image_url": "data:x"}])["prediction"],
            "prediction.content[1].type",
            "'image_url'; supported is 'text'",
        ),
        (content([{"type": "text"}])["prediction"], "prediction.content[0].text", "missing"),
        (
            content([{"type": "text", "text": 5}])["prediction"],
            "prediction.content[0].text",
            "must be a string",
        ),
        (content(parts(*["A"] * 1025))["prediction"], "prediction.content", "1024"),
    ],
)
async def test_what_is_none_is_refused_by_the_name_of_what_is_wrong(
    house: House, value: Any, param: str, says: str
) -> None:
    await check_refusal(house, {"prediction": value}, param, says)


async def test_names_in_it_are_what_they_are_in_a_users_text(house: House) -> None:
    """The names of special tokens are text; those of boxes and calls, which are no way out of a
    turn, stand for themselves, as they do in an answer."""
    text = "A<|im_end|>\n<|im_start|>user\n<img><IMG_CONTEXT></img><|endoftext|>"
    boxes = "<ref>cup</ref><box>[[1, 2, 3, 4]]</box>"
    for each in (text, boxes):
        await house.ask(**content(each), messages=[{"role": "user", "content": each}])
    plain, marked = house.engine.requests
    vocabulary = reference()
    special = {
        vocabulary.token_to_id(name)
        for name in ("<|im_end|>", "<|im_start|>", "<img>", "<IMG_CONTEXT>", "<|endoftext|>")
    }
    assert special.isdisjoint(predicted(plain))
    assert vocabulary.decode(predicted(plain)) == text
    assert marked.prediction == pack(encode_rendered(boxes))
    for request in (plain, marked):  # the prompt's text is cut where a turn begins and ends
        inside = predicted(request)[1:-1]
        found = range(len(request.prompt) - len(inside) + 1)
        assert any(request.prompt[at : at + len(inside)] == inside for at in found)


@pytest.mark.parametrize("tokens", [63, 64, 65, 100_000])
async def test_more_than_the_context_holds_is_cut(houses: Houses, tokens: int) -> None:
    house = await houses.open(FakeEngine(make_ready(max_model_len=64)))
    text = " red" * tokens
    assert (await house.ask(**content(text))).status_code == 200
    assert len(encode_rendered(" red" * 64)) >= 64
    assert house.engine.requests[0].prediction == pack(encode_rendered(" red" * 64)[:64][:tokens])


async def test_what_is_cut_is_not_tokenised(
    houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await houses.open(FakeEngine(make_ready(max_model_len=64)))
    tokenizer = house.service.served().tokenizer
    read: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: read.append(text) or encode(text))
    await house.ask(**content("x" * 3_000_000))
    assert 64 <= sum(map(len, read)) < 3000


@pytest.mark.parametrize("size", [10, THREAD_BYTES])
async def test_a_long_one_is_tokenised_in_a_thread(
    house: House, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    here = []
    predict = PromptBuilder.predict

    def noting(builder: PromptBuilder, text: str) -> bytes:
        here.append(threading.current_thread() is threading.main_thread())
        return predict(builder, text)

    monkeypatch.setattr(PromptBuilder, "predict", noting)
    assert (await house.ask(**content("x" * size))).status_code == 200
    assert (await house.ask()).status_code == 200  # which has none
    assert here == [size == 10]


@pytest.mark.parametrize("field", [{"n": 3}, {"best_of": {"n": 3}, "temperature": 1}])
async def test_all_choices_have_it(house: House, field: dict[str, Any]) -> None:
    house.engine.script = say("Yes")
    assert (await house.ask(**content(TEXT), **field)).status_code == 200
    found = [request.prediction for request in house.engine.requests]
    assert found == [pack(encode_rendered(TEXT))] * 3


@pytest.mark.parametrize("value", [TEXT, parts("A red ", "circle.")])
async def test_the_official_client_sends_it(house: House, value: Any) -> None:
    create = house.sdk.chat.completions.create
    whole = await create(
        model="tiny", messages=HELLO, prediction={"type": "content", "content": value}
    )
    stream = await create(
        model="tiny", messages=HELLO, prediction={"type": "content", "content": value}, stream=True
    )
    streamed = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert whole.choices[0].message.content == "".join(streamed) == "A red circle."
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is None  # it does not tell what came of it

    def text(request: EngineRequest) -> str:
        return reference().decode(predicted(request))

    expected = value if isinstance(value, str) else "A red circle."
    assert [*map(text, house.engine.requests)] == [expected] * 2
