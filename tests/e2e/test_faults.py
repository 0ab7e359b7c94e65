"""Whatever happens to the engine, the streams that are not to blame end as they would have.

One server for all faults: it must also be as good as new after each of them.
"""

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e import test_life as life
from tests.e2e.faulty_engine import Fault
from tests.servers import Server

ENGINE = "tests.e2e.faulty_engine"
TIMEOUT = 15.0  # of the watchdog, which lets an engine load for as long as that takes
COUNT = 6
ROWS = 7  # of all streams: one has two choices
TOKENS = 40
MARKED = 666
LENGTH = 'internvl_request_success_total{finished_reason="length"}'
COUNTED = (
    LENGTH,
    "internvl_prompt_tokens_total",
    "internvl_generation_tokens_total",
    "internvl_prefix_cache_queries_total",
    "internvl_requests_resumed_total",
    "internvl_time_to_first_token_seconds_count",
    "internvl_inter_token_latency_seconds_count",
    "internvl_e2e_request_latency_seconds_count",
    "internvl_request_queue_time_seconds_count",
    "internvl_request_prefill_time_seconds_count",
    "internvl_request_decode_time_seconds_count",
    "internvl_request_inference_time_seconds_count",
    "internvl_request_prompt_tokens_sum",
    "internvl_request_generation_tokens_sum",
)

Texts = dict[int, str]


class House:
    """A server whose engine fails on demand."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.fault = folder / "fault.json"
        # What a fault waits for is in the time of steps, which must not keep prompts out.
        flags = (*flags, "--step-budget-ms", "0", "--engine-timeout", str(TIMEOUT), str(self.fault))
        self.server = Server(folder / "log.txt", flags, module="tests.e2e.faulty_server")
        self._pool = ThreadPoolExecutor(COUNT + 1)
        self.whole: list[Texts] = []  # what is said without a fault
        self.once: dict[str, float] = {}  # what is counted then

    def inject(self, **fault: Any) -> None:
        part = self.fault.with_suffix(".part")
        part.write_text(json.dumps(asdict(Fault(**fault))))
        part.rename(self.fault)

    def begin(self, number: int | None = None) -> list[Future[Texts]]:
        """When all have begun, and before any goes on, the engine gets this signal."""
        begun = None
        if number is not None:
            begun = threading.Barrier(COUNT, functools.partial(os.kill, self.engine(), number))
        return [self._pool.submit(stream, self.server, number, begun) for number in range(COUNT)]

    def begin_marked(self) -> Future[Texts]:
        return self._pool.submit(stream, self.server, COUNT, seed=MARKED, temperature=1.0)

    def results(self, streams: list[Future[Texts]]) -> list[Texts]:
        return [future.result(240) for future in streams]

    def engine(self) -> int:
        (pid,) = self.server.children(ENGINE)
        return pid

    def successor(self, dead: int) -> int:
        """The engine behind one that dies."""
        end = time.monotonic() + 120
        while (pids := self.server.children(ENGINE)) in ([], [dead]):
            assert time.monotonic() < end, "there is no successor"
            time.sleep(0.01)
        (pid,) = pids
        return pid

    def is_away(self) -> None:
        """Not ready and says why, but alive."""
        self.server.wait_for_status("/ready", 503)
        answer = httpx.get(self.server.url + "/ready", timeout=60)
        if answer.status_code == 503:  # else it is back already
            assert answer.json()["reason"] == "the engine is starting again"
        assert httpx.get(self.server.url + "/live", timeout=60).status_code == 200

    def is_back(self) -> None:
        self.server.wait_for_status("/ready", 200)
        self.server.wait_for_metric("internvl_num_requests_running", 0)
        self.server.wait_for_metric("internvl_kv_blocks_used", 0)

    def count(self, name: str) -> float:
        return self.server.metric(name) or 0.0

    def counted(self) -> dict[str, float]:
        return {name: self.count(name) for name in COUNTED}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.server.close()


def stream(
    server: Server, number: int, begun: threading.Barrier | None = None, **options: Any
) -> Texts:
    """The text of each choice of a streamed answer; fails if tokens are missing."""
    texts, tokens = life.stream(server, number, begun, max_tokens=TOKENS, **options)
    assert tokens == TOKENS * (life.conversation(number) | options).get("n", 1)
    return texts


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("faulty"))
    try:
        house.whole = house.results(house.begin())
        house.server.wait_for_metric("internvl_requests_in_flight", 0)
        house.once = house.counted()
        assert house.once[LENGTH] == ROWS
        assert house.once["internvl_generation_tokens_total"] == ROWS * TOKENS
        assert house.once["internvl_inter_token_latency_seconds_count"] == ROWS * (TOKENS - 1)
        yield house
    finally:
        house.close()


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("raise", "step"),
        ("device memory", "step"),
        ("main memory", "step"),
        ("kill", "exit"),
    ],
)
def test_no_stream_notices_a_fault_in_a_step(house: House, how: str, kind: str) -> None:
    metric = f'internvl_engine_faults_total{{kind="{kind}"}}'
    before, counted = house.count(metric), house.counted()
    house.inject(how=how, rows=ROWS)
    streams = house.begin()
    house.is_away()
    assert house.results(streams) == house.whole
    house.is_back()
    assert house.count(metric) == before + 1
    # As where nothing fails: whoever goes on in another engine is counted once, and timed once.
    more = {name: value - counted[name] for name, value in house.counted().items()}
    assert more == house.once | {"internvl_requests_resumed_total": ROWS}


def test_no_stream_notices_an_engine_that_is_stopped(house: House) -> None:
    metric = 'internvl_engine_faults_total{kind="hang"}'
    before = house.count(metric)
    streams = house.begin(signal.SIGSTOP)
    house.is_away()
    assert house.results(streams) == house.whole
    house.is_back()
    assert house.count(metric) > before  # a busy machine may stop it for that long, too


def test_no_stream_notices_an_engine_that_dies_again_while_it_loads(house: House) -> None:
    first = house.engine()
    streams = house.begin(signal.SIGKILL)
    second = house.successor(first)
    os.kill(second, signal.SIGKILL)
    house.successor(second)
    house.is_away()
    assert house.results(streams) == house.whole
    house.is_back()


def test_a_request_that_engines_die_of_fails_alone(house: House) -> None:
    before = house.count("internvl_requests_given_up_total")
    house.inject(how="main memory", seed=MARKED, once=False)
    streams = house.begin()
    marked = house.begin_marked()
    with pytest.raises(openai.APIError) as failed:
        marked.result(240)
    house.fault.unlink()
    assert failed.value.body["code"] == "engine_error"
    assert house.results(streams) == house.whole
    house.is_back()
    assert house.count("internvl_requests_given_up_total") == before + 1


@pytest.mark.parametrize("how", ["messages", "responses"])
def test_a_request_that_engines_die_of_ends_in_the_words_of_its_api(house: House, how: str) -> None:
    asked: dict[str, Any] = {"seed": MARKED, "stream": True, "ignore_eos": True}
    if how == "messages":
        asked |= {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 400}
    else:
        asked |= {"input": "Hello!", "max_output_tokens": 400, "background": True}
    data = b""
    with httpx.stream("POST", f"{house.server.url}/v1/{how}", json=asked, timeout=90) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_raw():
            if b"delta" in piece and b"delta" not in data:  # it has begun to be written
                house.inject(how="main memory", seed=MARKED, once=False)
            data += piece
    house.fault.unlink()
    last = json.loads(data.rpartition(b"data: ")[2])
    if how == "messages":
        error = last["error"]
        assert (error["type"], error["details"]["error_code"]) == ("api_error", "engine_error")
    else:
        assert last["type"] == "response.failed"
        kept = httpx.get(f"{house.server.url}/v1/responses/{last['response']['id']}", timeout=60)
        assert kept.json() == last["response"]
        assert kept.json()["error"]["code"] == "server_error"
        assert kept.json()["output"][0]["status"] == "incomplete"
    house.is_back()


def test_a_row_that_is_not_a_number_fails_alone_and_is_not_found_again(house: House) -> None:
    restarts = house.count("internvl_engine_restarts_total")
    house.inject(how="nan", rows=2, seed=MARKED)
    streams = house.begin()
    with pytest.raises(openai.APIError):
        house.begin_marked().result(240)
    assert house.results(streams) == house.whole
    assert house.count("internvl_engine_restarts_total") == restarts
    house.is_back()
    # What it had computed may be wrong: the same prompt finds nothing at first.
    asked = life.conversation(COUNT) | {"model": "internvl-demo", "max_tokens": 4}
    with house.server.client() as client:
        found = [client.chat.completions.create(**asked).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in found]
    assert cached[0] == 0
    assert cached[1] > 0
