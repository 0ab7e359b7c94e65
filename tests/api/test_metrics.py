"""What /metrics counts: that everything is counted once, and that nobody can make it grow."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server import metrics as module
from server.metrics import OTHER, Metrics, Tally
from tests.api.conftest import House, Houses
from tests.api.test_chat import picture
from tests.fake_engine import EOS, FakeEngine, Step
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed
from wire.messages import EngineOutput, EngineRequest, EngineStats, Times

DEADLINE = 60.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def scrape(house: House) -> dict[str, float]:
    """All samples, by name and labels as they are written."""
    page = (await house.http.get("/metrics")).text
    found = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def finished(found: dict[str, float], reason: str) -> float:
    return found[f'internvl_request_success_total{{finished_reason="{reason}"}}']


def timed(*ids: int) -> Any:
    """A script: one output per token, and what an engine and its client tell of its times."""

    def script(request: EngineRequest) -> Iterable[Step]:
        yield EngineOutput(request.id, ids[:1], times=Times(1.0, 2.0))
        for token in ids[1:]:
            yield EngineOutput(request.id, [token], times=Times(decode=2.0))
        yield EngineOutput(request.id, [EOS], "stop", EOS, times=Times(decode=4.0))

    return script


async def test_every_request_and_every_choice_is_observed_once(house: House) -> None:
    house.engine.script = timed(*encode_rendered("A"), *encode_rendered("A"))
    asked = [await house.ask(), await house.ask(n=3), await house.ask(stream=True)]
    asked.append(await house.http.post("/v1/completions", json={"prompt": "Hello"}))
    assert [answer.status_code for answer in asked] == [200] * 4
    found = await scrape(house)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert found[f"internvl_{name}_count"] == 4, name
    choices = 6
    for name, seconds in (("queue", 1), ("prefill", 2), ("decode", 4), ("inference", 6)):
        metric = f"internvl_request_{name}_time_seconds"
        assert found[metric + "_count"] == choices, name
        assert found[metric + "_sum"] == seconds * choices, name
    assert found["internvl_request_time_per_output_token_seconds_sum"] == choices * 4 / 2
    assert found["internvl_request_generation_tokens_count"] == choices
    assert found["internvl_request_generation_tokens_sum"] == choices * 3
    assert found["internvl_generation_tokens_total"] == choices * 3
    assert finished(found, "stop") == choices
    assert sum(finished(found, why) for why in ("length", "tool_calls", "abort", "error")) == 0


async def test_the_answer_says_as_many_tokens_as_are_counted(house: House) -> None:
    """Those behind a stop string, which a slow reader finds in the same output, do not count."""
    ids = encode_rendered("A red circle. Another circle.")
    house.engine.script = lambda request: [EngineOutput(request.id, ids), [EOS]]
    answers = [(await house.ask(n=n, stop=["circle"])).json()["usage"] for n in (1, 2)]
    found = await scrape(house)
    generated = sum(usage["completion_tokens"] for usage in answers)
    assert found["internvl_generation_tokens_total"] == generated
    prompts = sum(usage["prompt_tokens"] for usage in answers)
    assert found["internvl_prompt_tokens_total"] == prompts
    assert found["internvl_request_prompt_tokens_sum"] == prompts


@pytest.mark.parametrize("at_once", [1, 3, 99])
async def test_a_stop_string_distorts_no_time_of_a_token(house: House, at_once: int) -> None:
    """Whether the engine, which took half a second for each, was told to stop there, or some of
    what came behind it has been read with it."""
    ids = encode_rendered("A red circle is here.")
    pieces = [ids[start : start + at_once] for start in range(0, len(ids), at_once)]

    def script(request: EngineRequest) -> Iterable[Step]:
        said = 0
        for piece in pieces:
            times = Times(1.0 * (not said), 2.0 * (not said), (said + len(piece) - 1) / 2)
            said += len(piece)
            yield EngineOutput(request.id, piece, times=times)
        yield EngineOutput(request.id, [EOS], "stop", EOS, times=Times(decode=said / 2))

    house.engine.script = script
    answer = await house.ask(stop=["red"])
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    found = await scrape(house)
    assert found["internvl_request_time_per_output_token_seconds_count"] == 1
    assert found["internvl_request_time_per_output_token_seconds_sum"] == 0.5
    assert found["internvl_request_decode_time_seconds_count"] == 1
    total = 2.0 + found["internvl_request_decode_time_seconds_sum"]
    assert found["internvl_request_inference_time_seconds_sum"] == total


async def test_who_leaves_and_whom_the_engine_fails_are_told_apart(house: House) -> None:
    never = asyncio.Event()
    said = asyncio.Event()

    def endless(request: EngineRequest) -> Iterable[Step]:
        yield EngineOutput(request.id, encode_rendered("A"), times=Times(1.0, 2.0))
        said.set()
        yield never

    house.engine.script = endless
    task = asyncio.ensure_future(house.ask(stream=True))
    await asyncio.wait_for(said.wait(), DEADLINE)
    assert (await house.http.delete("/v1/requests/nobody")).status_code == 404
    name = house.engine.requests[0].id
    assert (await house.http.delete(f"/v1/requests/{name}")).status_code == 200
    await asyncio.wait_for(task, DEADLINE)
    found = await scrape(house)
    assert (finished(found, "abort"), finished(found, "error")) == (1, 0)
    assert found["internvl_request_decode_time_seconds_count"] == 1  # it had a token
    house.engine.script = lambda _: [EngineFailed("told to")]
    assert (await house.ask()).status_code == 500
    house.engine.script = lambda request: [EngineOutput(request.id, [], "stuck")]
    assert (await house.ask()).status_code == 400
    found = await scrape(house)
    # The last is the client's own doing, and no reason to wake anybody.
    assert [finished(found, why) for why in ("abort", "error", "stuck")] == [1, 1, 1]
    assert found["internvl_request_decode_time_seconds_count"] == 1  # these had none
    assert found["internvl_e2e_request_latency_seconds_count"] == 3


async def test_what_waits_is_known_with_its_pictures_until_its_first_token(house: House) -> None:
    begin, end = asyncio.Event(), asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Step]:
        yield begin
        yield EngineOutput(request.id, encode_rendered("A"))
        yield end
        yield EngineOutput(request.id, [EOS], "stop", EOS)

    house.engine.script = script
    names = [f"internvl_num_{kind}_waiting" for kind in ("requests", "prompt_tokens")]
    names.append("internvl_num_visual_tokens_waiting")

    async def waiting() -> list[float]:
        found = await scrape(house)
        return [found[name] for name in names]

    assert await waiting() == [0, 0, 0]
    message = {"role": "user", "content": [picture("a"), picture("b", "low")]}
    task = asyncio.ensure_future(house.ask(messages=[message], stream=True, n=2))
    async with asyncio.timeout(DEADLINE):
        while not house.engine.requests:
            await asyncio.sleep(0)
    asked = house.engine.requests[0]
    visual = sum(item.length for item in asked.items)
    assert visual > 0
    assert await waiting() == [2, len(asked.prompt), visual]
    begin.set()
    async with asyncio.timeout(DEADLINE):
        while (await waiting())[0]:
            await asyncio.sleep(0)
    assert await waiting() == [0, 0, 0]
    end.set()
    await task
    assert await waiting() == [0, 0, 0]


async def test_statuses_that_nobody_has_foreseen_are_one(house: House) -> None:
    for status in (200, 200, 777, 778, 404, 499):
        house.service.metrics.requests.add(str(status))
    await house.http.request("BREW", "/v1/coffee")
    found = await scrape(house)
    statuses = {name for name in found if name.startswith("internvl_http_requests_total")}
    known = {f'internvl_http_requests_total{{status="{status}"}}' for status in (200, 404, 499)}
    other = f'internvl_http_requests_total{{status="{OTHER}"}}'
    assert known | {other} == statuses
    assert found[other] == 2


def test_a_label_has_the_values_that_are_known_and_one_more() -> None:
    tally = Tally(("stop", "length"))
    for value in ("stop", "stop", "length", "a", 'b"}\n', "c" * 10**6):
        tally.add(value)
    assert tally.counts == {"stop": 2, "length": 1, OTHER: 3}


async def test_a_finish_reason_of_no_known_kind_makes_no_label(house: House) -> None:
    house.engine.script = lambda request: [EngineOutput(request.id, [EOS], "forged", EOS)]
    await house.ask()
    found = await scrape(house)
    assert finished(found, OTHER) == 1
    assert not any("forged" in name for name in found)


async def test_an_answer_that_a_bug_ends_is_no_abort(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.chat.stream.Detokenizer.push", lambda *_: 1 // 0)
    assert (await house.ask()).status_code == 500
    found = await scrape(house)
    assert (finished(found, "error"), finished(found, "abort")) == (1, 0)


async def test_scrapers_get_openmetrics_where_they_ask_for_it(house: House) -> None:
    await house.ask(messages=[{"role": "user", "content": [picture("a")]}])
    answer = await house.http.get("/metrics", headers={"Accept": f"{OPENMETRICS},text/plain;q=0.5"})
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    families = {family.name for family in openmetrics.text_string_to_metric_families(answer.text)}
    plain = await house.http.get("/metrics", headers={"Accept": "nonsense;;,=,*/*"})
    assert plain.headers["Content-Type"].startswith("text/plain")
    parsed = list(text_string_to_metric_families(plain.text))
    assert families == {
        family.name.removesuffix("_info") if family.name.endswith("_info") else family.name
        for family in parsed
    }


@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
async def test_versions_that_are_no_numbers_are_passed_over(house: House, kind: str) -> None:
    answer = await house.http.get("/metrics", headers={"Accept": f"{kind}; version=newest"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
async def test_use_of_keys_is_for_operators_in_both_formats(houses: Houses, accept: str) -> None:
    house = await houses.open(admin_port=1, api_key=("secret",))
    page, _ = house.service.metrics.page(accept)
    assert b"internvl_key_requests" in page
    headers = {"Accept": accept, "Authorization": "Bearer secret"}
    public = await house.http.get("/metrics", headers=headers)
    assert public.status_code == 200
    assert "internvl_key_" not in public.text


async def test_the_state_and_the_engine_tell_whether_the_server_serves(houses: Houses) -> None:
    def state(found: dict[str, float]) -> list[str]:
        prefix = "internvl_state{state="
        return [name[len(prefix) + 1 : -2] for name in found if found[name] and prefix in name]

    engine = FakeEngine()
    engine.load.clear()
    house = await houses.open(engine, wait=False)
    found = await scrape(house)
    assert (state(found), found["internvl_engine_up"]) == (["starting"], 0)
    assert not any("cache_config_info" in name for name in found)
    engine.load.set()
    await house.service.settled.wait()
    found = await scrape(house)
    assert (state(found), found["internvl_engine_up"]) == (["ready"], 1)
    assert any('internvl_cache_config_info{attention="' in name for name in found)
    house.service.pause()
    assert state(await scrape(house)) == ["draining"]


async def test_counters_go_on_where_an_engine_was_lost(house: House) -> None:
    house.engine.stats = EngineStats(steps=5, blocks_used=3, blocks_total=4)
    house.engine.past = EngineStats(steps=100)
    found = await scrape(house)
    assert found["internvl_engine_steps_total"] == 105
    assert found["internvl_kv_cache_usage_perc"] == 0.75


async def test_a_blocked_loop_is_seen(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LAG_INTERVAL", 0.0)
    metrics: Metrics = house.service.metrics
    before = metrics.loop_lag.count
    task = asyncio.create_task(metrics.watch_loop())
    await asyncio.sleep(0)
    time.sleep(0.05)
    async with asyncio.timeout(DEADLINE):
        while metrics.loop_lag.count == before:
            await asyncio.sleep(0)
    task.cancel()
    assert metrics.loop_lag.sum >= 0.05
