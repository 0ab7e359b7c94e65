"""Whose a request is, what may wait of it, and what it may find in caches."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.api.conftest import House, Houses
from tests.api.test_life import HELLO, Client, within
from tests.fake_engine import EOS, FakeEngine
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineOutput

PICTURE = {"type": "image_url", "image_url": "data:x"}


def silent(engine: FakeEngine) -> asyncio.Event:
    """Make the engine write nothing before the returned event is set."""
    go_on = asyncio.Event()
    engine.script = lambda request: [
        go_on,
        encode_rendered("Yes"),
        EngineOutput(request.id, [EOS], "stop", EOS),
    ]
    return go_on


async def send(house: House, count: int, **body: Any) -> list["asyncio.Task[httpx.Response]"]:
    """Requests that have all reached the engine."""
    expected = len(house.engine.requests) + count
    asked = [asyncio.create_task(house.ask(**body)) for _ in range(count)]
    async with asyncio.timeout(60):
        while len(house.engine.requests) < expected:
            await asyncio.sleep(0)
    return asked


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask_as(house: House, key: str, **body: Any) -> httpx.Response:
    return await house.http.post("/v1/chat/completions", json=HELLO | body, headers=as_(key))


async def metric(house: House, name: str) -> float:
    page = (await house.http.get("/metrics")).text
    (line,) = (line for line in page.splitlines() if line.rsplit(" ", 1)[0] == name)
    return float(line.rsplit(" ", 1)[1])


# Limits


@pytest.mark.parametrize("stream", [False, True])
async def test_more_requests_than_may_wait_are_told_to_come_back(
    houses: Houses, stream: bool
) -> None:
    house = await houses.open(max_num_queued_reqs=2)
    go_on = silent(house.engine)
    asked = await send(house, 2)
    assert await metric(house, "internvl_num_requests_waiting") == 2
    refused = await within(house.ask(stream=stream))
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full_requests"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert len(house.engine.requests) == 2
    go_on.set()
    for answer in await within(asyncio.gather(*asked)):
        assert answer.status_code == 200
    assert (await within(house.ask(stream=stream))).status_code == 200
    assert await metric(house, "internvl_num_requests_waiting") == 0
    assert await metric(house, "internvl_num_prompt_tokens_waiting") == 0
    name = 'internvl_requests_refused_total{code="queue_full_requests"}'
    assert await metric(house, name) == 1
    assert await metric(house, "internvl_request_prompt_tokens_count") == 3


async def test_requests_are_refused_before_their_pictures_are_fetched(houses: Houses) -> None:
    house = await houses.open(max_num_queued_reqs=1)
    go_on = silent(house.engine)
    asked = await send(house, 1)
    refused = await house.ask(messages=[{"role": "user", "content": [PICTURE]}])
    assert refused.json()["error"]["code"] == "queue_full_requests"
    assert not house.media.parts
    go_on.set()
    await within(asyncio.gather(*asked))


async def test_tokens_of_pictures_count_and_a_refused_request_leaves_nothing(
    houses: Houses,
) -> None:
    house = await houses.open(max_num_queued_tokens=30)
    go_on = silent(house.engine)
    asked = await send(house, 1)
    length = len(house.engine.requests[0].prompt)
    assert 2 * length <= 30 < 2 * length + 2 * 6  # a picture has six tokens
    assert await metric(house, "internvl_num_prompt_tokens_waiting") == length
    content = [{"type": "text", "text": "Hello!"}, PICTURE, PICTURE]
    for stream in (False, True):
        refused = await within(
            house.ask(stream=stream, messages=[{"role": "user", "content": content}])
        )
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full_tokens"
    assert len(house.engine.requests) == 1
    assert await metric(house, "internvl_num_prompt_tokens_waiting") == length
    go_on.set()
    await within(asyncio.gather(*asked))
    # Over the limit alone, and nothing waits.
    large = await house.ask(messages=[{"role": "user", "content": content * 2}])
    assert large.status_code == 200
    assert len(house.engine.requests[-1].prompt) > 30
    assert house.service.gate.idle.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_list_of_prompts_waits_as_one_and_is_let_in_where_nothing_waits(
    houses: Houses, stream: bool
) -> None:
    limits = [{"max_num_queued_tokens": 8}, {"max_num_queued_reqs": 3}]
    asked = {"model": "tiny", "prompt": ["Hello!"] * 5, "max_tokens": 2, "stream": stream}
    for limit in limits:
        house = await houses.open(**limit)
        go_on = silent(house.engine)
        waiting = asyncio.create_task(house.http.post("/v1/completions", json=asked))
        async with asyncio.timeout(60):
            while len(house.engine.requests) < 5:
                await asyncio.sleep(0)
        refused = await within(house.http.post("/v1/completions", json=asked))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"].startswith("queue_full_")
        assert len(house.engine.requests) == 5
        go_on.set()
        answer = await within(waiting)
        assert answer.status_code == 200
        assert "error" not in answer.text
        assert await metric(house, "internvl_num_prompt_tokens_waiting") == 0
        assert await metric(house, "internvl_num_requests_waiting") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_of_lists_that_come_at_once_no_more_are_let_in_than_may_wait(
    houses: Houses, stream: bool
) -> None:
    house = await houses.open(max_num_queued_reqs=12)
    go_on = silent(house.engine)
    asked = {"model": "tiny", "prompt": ["Hello!"] * 5, "max_tokens": 2, "stream": stream}
    waiting = [asyncio.create_task(house.http.post("/v1/completions", json=asked)) for _ in "12345"]
    async with asyncio.timeout(60):
        while len(house.engine.requests) < 10 or sum(task.done() for task in waiting) < 3:
            await asyncio.sleep(0)
    assert len(house.engine.requests) == 10
    go_on.set()
    answers = [await within(task) for task in waiting]
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 3
    assert await metric(house, "internvl_num_requests_waiting") == 0


async def test_every_choice_counts(houses: Houses) -> None:
    house = await houses.open(max_num_queued_reqs=4)
    go_on = silent(house.engine)
    asked = await send(house, 1)
    assert (await house.ask(n=4)).status_code == 429
    asked += await send(house, 1, n=3)
    assert await metric(house, "internvl_num_requests_waiting") == 4
    go_on.set()
    for answer in await within(asyncio.gather(*asked)):
        assert answer.status_code == 200
    assert await metric(house, "internvl_num_requests_waiting") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_waits_no_longer(houses: Houses, stream: bool) -> None:
    house = await houses.open(max_num_queued_reqs=1)
    silent(house.engine)
    client = Client(house, HELLO | {"stream": stream})
    async with asyncio.timeout(60):
        while not house.engine.requests:
            await asyncio.sleep(0)
    assert (await house.ask()).status_code == 429
    client.leave()
    await within(client.task)
    assert await metric(house, "internvl_num_requests_waiting") == 0


async def test_an_engine_that_fails_leaves_nothing_waiting(houses: Houses) -> None:
    house = await houses.open(max_num_queued_reqs=1)
    house.engine.script = lambda _: [RuntimeError("no")]
    for _ in range(3):
        assert (await house.ask()).status_code == 500
    assert await metric(house, "internvl_num_prompt_tokens_waiting") == 0


async def test_a_running_request_does_not_wait(houses: Houses) -> None:
    house = await houses.open(max_num_queued_reqs=1)
    go_on = asyncio.Event()
    house.engine.script = lambda request: [
        encode_rendered("Yes"),
        go_on,
        EngineOutput(request.id, [EOS], "stop", EOS),
    ]
    clients = [Client(house, HELLO | {"stream": True}) for _ in range(3)]
    for client in clients:
        await within(client.read_until(b"Yes"))
    go_on.set()
    await within(asyncio.gather(*(client.task for client in clients)))


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("max_num_queued_reqs", "queue_full_requests"),
        ("max_concurrent_requests", "too_many_requests"),
    ],
)
async def test_under_the_fair_policy_one_key_cannot_fill_the_server_for_another(
    houses: Houses, limit: str, code: str
) -> None:
    house = await houses.open(policy="fair", api_key=("flood", "other"), **{limit: 2})
    go_on = silent(house.engine)
    asked = [asyncio.create_task(ask_as(house, "flood")) for _ in range(2)]
    async with asyncio.timeout(60):
        while len(house.engine.requests) < 2:
            await asyncio.sleep(0)
    assert (await ask_as(house, "flood")).status_code == 429
    asked.append(asyncio.create_task(ask_as(house, "other")))
    async with asyncio.timeout(60):
        while len(house.engine.requests) < 3:
            await asyncio.sleep(0)
    for key in ("flood", "other"):
        refused = await ask_as(house, key)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == code
    go_on.set()
    assert {answer.status_code for answer in await within(asyncio.gather(*asked))} == {200}


# What the engine is told


async def test_each_key_has_its_tenant_its_weight_and_its_caches(houses: Houses) -> None:
    house = await houses.open(api_key=("first", "second"), api_key_weights=(1.0, 4.0))
    content = [PICTURE, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    for key in ("first", "second", "first"):
        for salt in ({}, {"cache_salt": "mine"}):
            assert (await ask_as(house, key, **body, **salt)).status_code == 200
    requests = house.engine.requests
    assert [request.weight for request in requests] == [1.0, 1.0, 4.0, 4.0, 1.0, 1.0]
    assert len({request.tenant for request in requests}) == 2
    assert len({request.cache_salt for request in requests}) == 4
    for once, again in zip(requests[:2], requests[4:], strict=True):
        assert (again.tenant, again.cache_salt) == (once.tenant, once.cache_salt)
    assert len({part.salt for part in house.media.parts}) == 2
    sent = repr(requests) + repr(house.media.parts)
    assert "first" not in sent
    assert "second" not in sent


async def test_caches_are_shared_where_that_is_wanted_or_nobody_has_a_key(houses: Houses) -> None:
    house = await houses.open(api_key=("first", "second"), cache_per_key=False)
    for key in ("first", "second"):
        await ask_as(house, key, cache_salt="ours")
    assert {request.cache_salt for request in house.engine.requests} == {b"ours"}
    assert len({request.tenant for request in house.engine.requests}) == 2
    house = await houses.open()
    await house.ask()
    assert house.engine.requests[0].cache_salt == b""
    assert house.engine.requests[0].tenant == b""


# Priority


async def test_priority_reaches_the_engine_under_its_policy(houses: Houses) -> None:
    house = await houses.open(policy="priority")
    for priority in (-5, 0, 2**31 - 1):
        assert (await house.ask(priority=priority, n=2)).status_code == 200
    found = [request.priority for request in house.engine.requests]
    assert found == [-5, -5, 0, 0, 2**31 - 1, 2**31 - 1]


async def test_priority_is_refused_under_another_policy_unless_it_is_zero(house: House) -> None:
    refused = await house.ask(priority=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
    for priority in (0, None):
        assert (await house.ask(priority=priority)).status_code == 200


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 1.5, "1", True, 10**30])
async def test_a_priority_that_is_no_such_number_names_the_field(
    house: House, priority: object
) -> None:
    refused = await house.ask(priority=priority)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"
