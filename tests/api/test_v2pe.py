"""``v2pe_delta``: how many positions each token of a picture takes, as clients and operators ask
for it; what becomes of it in the model is tests/parity/test_v2pe.py."""

from typing import Any

import msgspec
import pytest

from tests.api.conftest import House, Houses
from tests.api.test_usage import TWO
from tests.fake_engine import FakeEngine, make_ready
from wire.positions import STEPS, all_saved


def short_of(positions: int) -> FakeEngine:
    """An engine whose context is longer than the positions its model was trained with."""
    return FakeEngine(msgspec.structs.replace(make_ready(), max_positions=positions))


def step(house: House) -> float:
    (found,) = {item.step for item in house.engine.requests[-1].items}
    return found


async def test_the_step_is_asked_for_and_told(house: House) -> None:
    told = (await house.ask(messages=TWO, v2pe_delta=0.25)).json()["usage"]["internvl"]
    assert step(house) == told["v2pe_delta"] == 0.25
    told = (await house.ask(messages=TWO)).json()["usage"]["internvl"]
    assert step(house) == 1
    assert "v2pe_delta" not in told


async def test_operators_say_what_holds_where_nothing_is_asked(houses: Houses) -> None:
    house = await houses.open(v2pe_delta="1/64")
    await house.ask(messages=TWO)
    assert step(house) == 1 / 64
    await house.ask(messages=TWO, v2pe_delta=1)
    assert step(house) == 1
    source = {"type": "base64", "media_type": "image/png", "data": "aaaa"}
    message = {"role": "user", "content": [{"type": "image", "source": source}]}
    body = {"model": "tiny", "max_tokens": 9, "messages": [message]}
    assert (await house.http.post("/v1/messages", json=body)).status_code == 200
    assert step(house) == 1 / 64


@pytest.mark.parametrize("where", ["messages", "responses"])
async def test_the_other_apis_ask_alike(house: House, where: str) -> None:
    if where == "messages":
        source = {"type": "base64", "media_type": "image/png", "data": "aaaa"}
        content: list[dict[str, Any]] = [{"type": "image", "source": source}]
        body = {"max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    else:
        content = [{"type": "input_image", "image_url": "data:image/png;base64,aaaa"}]
        body = {"input": [{"role": "user", "content": content}]}
    asked = {"model": "tiny", "v2pe_delta": 0.125} | body
    assert (await house.http.post(f"/v1/{where}", json=asked)).status_code == 200
    assert step(house) == 0.125
    refused = await house.http.post(f"/v1/{where}", json=asked | {"v2pe_delta": 3})
    assert refused.status_code == 400
    assert "v2pe_delta must be 'auto' or one of" in refused.json()["error"]["message"]


@pytest.mark.parametrize("positions", range(18, 48))
async def test_auto_is_the_largest_step_that_ends_inside_the_positions(
    houses: Houses, positions: int
) -> None:
    house = await houses.open(short_of(positions))
    answer = await house.ask(messages=TWO, v2pe_delta="auto", max_completion_tokens=5)
    lengths = {}
    for each in STEPS:
        asked = await house.ask(messages=TWO, v2pe_delta=each, max_completion_tokens=5)
        lengths[each] = asked.status_code == 200
    fitting = [each for each, fits in lengths.items() if fits]
    if not fitting:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        return
    house.engine.requests.clear()
    await house.ask(messages=TWO, v2pe_delta="auto", max_completion_tokens=5)
    assert step(house) == fitting[0]
    request = house.engine.requests[-1]
    assert len(request.prompt) + 5 - all_saved(request.items) <= positions


async def test_auto_does_not_count_what_the_context_cuts_off(houses: Houses) -> None:
    house = await houses.open(FakeEngine(make_ready(max_model_len=60)))
    source = {"type": "base64", "media_type": "image/png", "data": "aaaa"}
    message = {"role": "user", "content": [{"type": "image", "source": source}]}
    body = {"max_tokens": 10**6, "messages": [message], "v2pe_delta": "auto"}
    assert (await house.http.post("/v1/messages", json=body)).status_code == 200
    assert step(house) == 1


async def test_clients_are_told_a_length_that_text_can_have(houses: Houses) -> None:
    house = await houses.open(short_of(30))
    assert house.engine.ready is not None
    assert house.engine.ready.max_model_len > 30
    (told,) = (await house.http.get("/v1/models")).json()["data"]
    assert told["max_model_len"] == 30


async def test_answers_end_where_the_positions_do(houses: Houses) -> None:
    house = await houses.open(short_of(60))
    await house.ask(messages=TWO, v2pe_delta=1 / 256)
    request = house.engine.requests[-1]
    end = len(request.prompt) + request.sampling.max_tokens
    assert end == 60 + all_saved(request.items) == 60 + 9 - 2
    text = [{"role": "user", "content": "a b c d e f g h " * 8}]
    refused = await house.ask(messages=text, v2pe_delta=1 / 256)
    assert refused.status_code == 400
    assert "context length is 60 tokens" in refused.json()["error"]["message"]
    refused = await house.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a b c d e f g h " * 8}
    )
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("value", [0.3, 0, 2, True, "1/4", "big", [], 1 / 512])
async def test_other_steps_are_refused_by_name(house: House, value: Any) -> None:
    refused = await house.ask(v2pe_delta=value)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "v2pe_delta"
    assert "must be 'auto' or one of 1, 0.5, 0.25" in refused.json()["error"]["message"]
