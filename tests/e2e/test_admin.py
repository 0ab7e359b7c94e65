"""The operators' port of a real server with the demo model."""

import contextlib
import gzip
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from engine.watch import TRACED_STEPS
from server.keys import fingerprint
from tests.servers import Server, draw, free_port

LONG: Any = {"max_tokens": 3500, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    file = folder / "admin.toml"
    file.write_text(f'[keys.ops]\nsha256 = "{fingerprint("admin").hex()}"\n')
    flags = ["--admin-port", str(free_port()), "--admin-key-file", str(file)]
    flags += ["--drain-timeout", "600"]
    server = Server(folder / "log.txt", flags)
    server.admin = f"http://127.0.0.1:{flags[1]}"  # type: ignore[attr-defined]
    yield server
    server.close()
    assert server.process.returncode == 0


def act(server: Server, method: str, path: str, key: str = "admin") -> httpx.Response:
    address = server.admin + path  # type: ignore[attr-defined]
    return httpx.request(method, address, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def test_a_stream_that_is_ended_says_so_and_its_memory_is_free(server: Server) -> None:
    assert act(server, "GET", "/state", "wrong").status_code == 401
    begun = threading.Event()
    ends: list[openai.APIError] = []

    def read() -> None:
        hello: Any = [{"role": "user", "content": "Hello!"}]
        with server.client() as client:
            create = client.chat.completions.create
            try:
                for _ in create(model="internvl-demo", messages=hello, stream=True, **LONG):
                    begun.set()
            except openai.APIError as error:
                ends.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    assert act(server, "GET", "/state").json()["requests_in_flight"] == 1
    assert act(server, "POST", "/drain").json()["state"] == "draining"
    with pytest.raises(openai.InternalServerError):
        server.ask("Hello!")
    assert act(server, "POST", "/abort").json() == {"aborted": 1}
    reader.join(60)
    (end,) = ends
    assert end.code == "aborted_by_operator"
    server.wait_for_metric("internvl_kv_blocks_used", 0)
    server.wait_for_metric("internvl_requests_in_flight", 0)
    assert act(server, "POST", "/resume").json()["state"] == "ready"
    server.wait_for_status("/ready", 200)


def test_after_a_flush_a_picture_is_computed_again_with_the_same_answer(server: Server) -> None:
    def ask() -> tuple[str, int, float | None]:
        text = server.ask(draw("red", "circle"), "What is in this picture? " * 8)
        cached = server.metric("internvl_prefix_cache_hits_total")
        assert cached is not None
        return text, int(cached), server.metric("internvl_encoded_tiles_total")

    first, _, encoded = ask()
    again, cached, same = ask()
    assert (again, same) == (first, encoded)
    assert cached > 0
    assert act(server, "POST", "/cache/flush").status_code == 200
    after, still, more = ask()
    assert after == first
    assert still == cached
    assert more is not None
    assert encoded is not None
    assert more > encoded
    assert ask()[1] > cached


def test_the_log_level_and_a_profile(server: Server) -> None:
    assert "DEBUG" not in server.log.read_text()
    assert act(server, "POST", "/log-level?level=debug").status_code == 200
    for _ in range(1000):  # the line is written behind the answer
        httpx.get(server.url + "/live", timeout=60)
        if "DEBUG   api" in server.log.read_text():
            break
    else:
        pytest.fail("nothing is logged at debug")
    body: Any = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    address = server.url + "/v1/chat/completions"
    httpx.post(address, json=body, headers={"X-Request-Id": "a-request"}, timeout=60)
    end = time.monotonic() + 60
    while " DEBUG   engine a-request engine.scheduler: request=" not in server.log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert act(server, "POST", "/log-level?level=info").json()["log_level"] == "info"
    page = act(server, "POST", "/profile?seconds=0.2").text
    assert "function calls" in page
    assert "(run_once)" in page or "_run_once" in page
    asked = body | {"max_tokens": 3500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", address, json=asked, timeout=60) as answer:
        assert answer.status_code == 200
        assert "(plan)" in act(server, "POST", "/profile?seconds=1&of=engine").text
    assert "key=ops" in server.log.read_text()


def test_a_trace_ends_with_the_engine_and_that_of_the_next_has_what_the_model_computes(
    server: Server,
) -> None:
    (engine,) = server.children("engine")
    trace = "/profile?seconds=30&of=model"
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(act, server, "POST", trace)
        while not act(server, "GET", "/state").json()["profiling"]:
            assert not taken.done()
        os.kill(engine, signal.SIGKILL)
        assert taken.result(60).status_code == 503
        server.wait_for_status("/ready", 200)
        assert not act(server, "GET", "/state").json()["profiling"]
        taken = pool.submit(act, server, "POST", trace)
        while not act(server, "GET", "/state").json()["profiling"]:
            assert not taken.done()
        server.ask("Hello!", **LONG | {"max_tokens": 300})
        answer = taken.result(60)
    assert answer.headers["content-type"] == "application/gzip"
    names = Counter(
        event.get("name") for event in json.loads(gzip.decompress(answer.content))["traceEvents"]
    )
    assert 0 < names["aten::embedding"] <= TRACED_STEPS
    assert names["aten::linear"] > 4 * names["aten::embedding"]  # in each layer
    assert "USDT" not in server.log.read_text()


def test_a_second_signal_ends_what_the_first_lets_finish(server: Server) -> None:
    """The last of this file: it ends the server."""
    begun = threading.Event()
    lines: list[str] = []

    def read() -> None:
        body = {"messages": [{"role": "user", "content": "Hello!"}], "stream": True, "n": 8}
        body |= {"max_tokens": 3500, "ignore_eos": True}
        address = server.url + "/v1/chat/completions"
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", address, json=body, timeout=60) as answer,
        ):
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_status("/ready", 503)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    reader.join(60)
    assert "data: [DONE]" not in lines or "error" in "".join(lines)
