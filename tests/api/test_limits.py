"""Keys from a file and their limits, through the application, on a clock that the test turns."""

import asyncio
import logging
from pathlib import Path

import anyio
import httpx
import openai
import pytest

from server.keys import fingerprint
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import HELLO, within
from tests.api.test_tenants import as_, ask_as, silent
from tests.fake_engine import say
from tests.unit.test_limits import Clock

PICTURE = {"type": "image_url", "image_url": "data:x"}


async def open_with(
    houses: Houses, folder: Path, clock: Clock | None = None, policy: str = "fcfs", **entries: str
) -> House:
    file = anyio.Path(folder / "keys.toml")
    hashes = {name: fingerprint(name).hex() for name in entries}
    text = "\n".join(
        f'[keys.{name}]\nsha256 = "{hashes[name]}"\n{more}' for name, more in entries.items()
    )
    await file.write_text(text)
    return await houses.open(api_keys_file=str(file), clock=clock or Clock(), policy=policy)


async def test_requests_beyond_the_limit_are_told_when_to_come_back_and_then_answered(
    houses: Houses, tmp_path: Path
) -> None:
    clock = Clock()
    house = await open_with(houses, tmp_path, clock, alice="requests_per_minute = 3", bob="")
    for left in (2, 1, 0):
        answer = await ask_as(house, "alice")
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert (
            answer.headers["x-ratelimit-reset-requests"]
            == f"{'1m0s' if not left else f'{60 - left * 20}s'}"
        )
    for stream in (False, True):
        refused = await ask_as(house, "alice", stream=stream)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "20"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "3 requests a minute" in error["message"]
    other = await ask_as(house, "bob")
    assert other.status_code == 200
    assert not any(name.startswith("x-ratelimit") for name in other.headers)
    clock.now += 19
    assert (await ask_as(house, "alice")).status_code == 429
    clock.now += 1
    assert (await ask_as(house, "alice", stream=True)).status_code == 200
    assert len(house.engine.requests) == 5
    assert house.service.gate.idle.is_set()


async def test_tokens_are_counted_as_they_were_used(houses: Houses, tmp_path: Path) -> None:
    clock = Clock()
    house = await open_with(houses, tmp_path, clock, alice="tokens_per_minute = 100")
    house.engine.script = say("A red circle")
    answer = await ask_as(house, "alice", max_tokens=50)
    used = answer.json()["usage"]["total_tokens"]
    assert 0 < used < 50
    assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
    prompt = answer.json()["usage"]["prompt_tokens"]
    # A stream begins before it is known what it takes.
    stream = await ask_as(house, "alice", stream=True, max_tokens=30)
    assert stream.headers["x-ratelimit-remaining-tokens"] == str(100 - used - prompt - 30)
    refused = await ask_as(house, "alice", max_tokens=60)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    missing = prompt + 60 - (100 - 2 * used)
    seconds = -(-missing * 60 // 100)
    assert refused.headers["retry-after"] == str(seconds)
    assert refused.headers["x-ratelimit-remaining-tokens"] == str(100 - 2 * used)
    clock.now += seconds
    assert (await ask_as(house, "alice", max_tokens=60)).status_code == 200
    account = house.service.keys.accounts["alice"]
    assert account.usage.prompt_tokens == 3 * prompt
    assert account.usage.completion_tokens == 3 * (used - prompt)


async def test_what_is_read_is_a_request_and_what_is_ended_is_none(
    houses: Houses, tmp_path: Path
) -> None:
    house = await open_with(houses, tmp_path, alice="requests_per_minute = 3", bob="")

    async def answer(method: str, path: str) -> tuple[int, str | None]:
        found = await house.http.request(method, path, headers=as_("alice"))
        return found.status_code, found.headers.get("x-ratelimit-remaining-requests")

    assert await answer("GET", "/v1/models") == (200, "2")
    assert await answer("GET", "/v1/responses/resp_none") == (404, "1")
    for path in ("/live", "/started", "/ready", "/metrics"):
        assert await answer("GET", path) == (200, None)
    assert await answer("HEAD", "/v1/chat/completions/none/events") == (404, "0")
    for method in ("GET", "HEAD"):
        refused = await house.http.request(method, "/v1/models", headers=as_("alice"))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "20"
    assert refused.content == b""
    assert await answer("DELETE", "/v1/requests/none") == (404, None)
    assert (await ask_as(house, "alice")).status_code == 429
    assert (await house.http.get("/v1/models", headers=as_("bob"))).status_code == 200


async def test_what_never_fits_is_a_400_that_counts(houses: Houses, tmp_path: Path) -> None:
    house = await open_with(
        houses, tmp_path, alice="tokens_per_minute = 40\nvisual_tokens_per_minute = 10"
    )
    error = (await ask_as(house, "alice", max_tokens=100)).json()["error"]
    assert error["code"] == "request_exceeds_rate_limit"
    assert error["param"] == "max_tokens"
    assert "100 for the answer" in error["message"]
    content = [{"type": "text", "text": "x"}, PICTURE, PICTURE]
    for stream in (False, True):
        refused = await ask_as(
            house,
            "alice",
            stream=stream,
            max_tokens=1,
            messages=[{"role": "user", "content": content}],
        )
        assert refused.status_code == 400
        assert "12 visual tokens" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
        assert refused.headers["x-ratelimit-remaining-visual-tokens"] == "10"
    assert not house.engine.requests
    assert await metric_of(house, "internvl_num_requests_waiting") == 0


async def metric_of(house: House, name: str) -> float:
    page = (await house.http.get("/metrics", headers=as_("alice"))).text
    (line,) = (line for line in page.splitlines() if line.rsplit(" ", 1)[0] == name)
    return float(line.rsplit(" ", 1)[1])


async def test_a_key_without_tokens_cannot_have_pictures_fetched(
    houses: Houses, tmp_path: Path
) -> None:
    house = await open_with(houses, tmp_path, alice="tokens_per_minute = 20")
    house.engine.script = say("word " * 30)
    assert (await ask_as(house, "alice")).status_code == 200  # of unknown length: it owes now
    refused = await ask_as(house, "alice", messages=[{"role": "user", "content": [PICTURE]}])
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    assert int(refused.headers["retry-after"]) > 60
    assert not house.media.parts


async def test_requests_at_once_are_bounded_for_each_key(houses: Houses, tmp_path: Path) -> None:
    house = await open_with(houses, tmp_path, alice="max_concurrent_requests = 2", bob="")
    go_on = silent(house.engine)
    asked = [asyncio.create_task(ask_as(house, "alice", stream=n == 1)) for n in range(2)]
    async with asyncio.timeout(60):
        while len(house.engine.requests) < 2:
            await asyncio.sleep(0)
    assert await metric_of(house, 'internvl_key_requests_running{key="alice"}') == 2
    refused = await ask_as(house, "alice")
    assert refused.status_code == 429
    assert "2 requests of this API key" in refused.json()["error"]["message"]
    asked.append(asyncio.create_task(ask_as(house, "bob")))
    async with asyncio.timeout(60):
        while len(house.engine.requests) < 3:
            await asyncio.sleep(0)
    go_on.set()
    for answer in await within(asyncio.gather(*asked)):
        assert answer.status_code == 200
    assert (await ask_as(house, "alice")).status_code == 200
    for name, value in {
        'internvl_key_requests_total{key="alice"}': 3,
        'internvl_key_requests_refused_total{key="alice"}': 1,
        'internvl_key_requests_total{key="bob"}': 1,
        'internvl_key_requests_running{key="alice"}': 0,
    }.items():
        assert await metric_of(house, name) == value


async def test_priority_and_weight_of_a_key_reach_the_engine(
    houses: Houses, tmp_path: Path
) -> None:
    house = await open_with(
        houses,
        tmp_path,
        policy="priority",
        free="priority = 10\nweight = 0.5",
        paid="priority = -5",
    )
    for key, asked in (("free", None), ("free", -100), ("free", 12), ("paid", None), ("paid", 0)):
        assert (await ask_as(house, key, priority=asked)).status_code == 200
    requests = house.engine.requests
    assert [request.priority for request in requests] == [10, 10, 12, -5, 0]
    assert [request.weight for request in requests] == [0.5, 0.5, 0.5, 1, 1]
    assert "free" not in repr(requests)


async def test_either_header_carries_the_key(houses: Houses, tmp_path: Path) -> None:
    house = await open_with(houses, tmp_path, alice="")
    for headers, status in (
        ({"x-api-key": "alice"}, 200),
        ({"Authorization": "bearer  alice "}, 200),
        ({"x-api-key": "alic"}, 401),
        ({"x-api-key": "alice", "Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "alice"}, 401),
    ):
        answer = await house.http.get("/v1/models", headers=headers)
        assert answer.status_code == status


async def test_the_sdk_sees_the_errors_it_knows_and_comes_back_in_time(
    houses: Houses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    house = await open_with(houses, tmp_path, clock, alice="requests_per_minute = 2")
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr("anyio.sleep", sleep)
    async with listening(house) as port:

        async def ask(key: str, retries: int = 0) -> str | None:
            async with openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=retries
            ) as sdk:
                create = sdk.chat.completions.with_raw_response.create
                answer = await create(
                    model="tiny", messages=[{"role": "user", "content": "Hello!"}]
                )
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            return answer.parse().choices[0].message.content

        with pytest.raises(openai.AuthenticationError) as unknown:
            await ask("malory")
        assert unknown.value.code == "invalid_api_key"
        for _ in range(2):
            assert await ask("alice")
        with pytest.raises(openai.RateLimitError) as limited:
            await ask("alice")
        assert limited.value.code == "rate_limit_exceeded"
        assert limited.value.type == "requests"
        assert not slept
        assert await ask("alice", retries=1)
        assert slept == [30.0]


async def test_names_stand_in_the_log_and_keys_do_not(
    houses: Houses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        house = await open_with(houses, tmp_path, alice="")
        await ask_as(house, "alice")
        await house.http.post("/v1/chat/completions", json=HELLO, headers=as_("sk-typo"))
    assert "status=200" in caplog.text
    assert "key=alice" in caplog.text
    assert "sk-typo" not in caplog.text
    assert fingerprint("alice").hex() not in caplog.text


async def test_a_client_that_leaves_pays_for_what_it_had(houses: Houses, tmp_path: Path) -> None:
    house = await open_with(houses, tmp_path, alice="tokens_per_minute = 300")
    silent(house.engine)
    asked = asyncio.create_task(ask_as(house, "alice", max_tokens=200))
    async with asyncio.timeout(60):
        while not house.engine.requests:
            await asyncio.sleep(0)
    account = house.service.keys.accounts["alice"]
    length = len(house.engine.requests[0].prompt)
    assert account.headers()["x-ratelimit-remaining-tokens"] == str(100 - length)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert account.headers()["x-ratelimit-remaining-tokens"] == str(300 - length)
    assert account.running == 0


async def test_several_texts_are_refused_together_before_one_is_begun(
    houses: Houses, tmp_path: Path
) -> None:
    clock = Clock()
    house = await open_with(houses, tmp_path, clock, alice="tokens_per_minute = 100")

    async def complete(count: int, max_tokens: int) -> httpx.Response:
        body = {"prompt": ["Hello!"] * count, "max_tokens": max_tokens}
        return await house.http.post("/v1/completions", json=body, headers=as_("alice"))

    never = await complete(4, 30)
    assert never.status_code == 400
    assert never.json()["error"]["code"] == "request_exceeds_rate_limit"
    assert never.json()["error"]["param"] == "max_tokens"
    assert (await complete(2, 30)).status_code == 200
    asked = len(house.engine.requests)
    later = await complete(3, 30)
    assert later.status_code == 429
    assert len(house.engine.requests) == asked
    clock.now += int(later.headers["retry-after"])
    assert (await complete(3, 30)).status_code == 200


async def test_an_answer_that_was_made_to_fit_is_charged_as_what_it_may_have(
    houses: Houses, tmp_path: Path
) -> None:
    """Of its 4000 tokens only those that fit in a context of 512 can come."""
    house = await open_with(houses, tmp_path, alice="tokens_per_minute = 600")
    body = HELLO | {"max_tokens": 4000}
    answer = await house.http.post("/v1/messages", headers=as_("alice"), json=body)
    assert answer.status_code == 200
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 600 - 512
