"""Through real processes: clients leave, workers and engines die, the server is told to stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.servers import Server, draw

LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the test's own, because the test breaks it."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.close()


def idle(server: Server) -> None:
    server.wait_for_metric("internvl_kv_blocks_used", 0)
    server.wait_for_metric("internvl_requests_running", 0)
    server.wait_for_metric("internvl_requests_waiting", 0)


def test_a_client_that_leaves_frees_its_blocks(demo_server: Server) -> None:
    with demo_server.client() as client:
        stream = client.chat.completions.create(
            model="internvl-demo",
            messages=[{"role": "user", "content": "Hello!"}],
            stream=True,
            **LONG,
        )
        next(iter(stream))
        stream.close()
    idle(demo_server)


def test_a_killed_decode_worker_costs_nothing(server: Server) -> None:
    (worker,) = server.children("preprocessing.worker")
    os.kill(worker, signal.SIGKILL)
    for _ in range(4):
        assert "red" in server.ask(draw("red", "circle"), "What is in this picture?")


def stream(server: Server, started: threading.Event | None = None) -> tuple[str, object]:
    """Text and usage of one long greedy answer."""
    text = ""
    usage = None
    with server.client() as client:
        for chunk in client.chat.completions.create(
            model="internvl-demo",
            messages=[{"role": "user", "content": "Hello!"}],
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            **LONG,
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if text and started is not None:
                    started.set()
    return text, usage


def test_a_client_does_not_notice_that_the_engine_was_killed(server: Server) -> None:
    whole = stream(server)
    (engine,) = server.children("engine")
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, server, started)
        assert started.wait(30)
        os.kill(engine, signal.SIGKILL)
        assert not answer.done()
        assert answer.result(60) == whole
    server.wait_for_status("/ready", 200)
    assert server.children("engine") != [engine]
    assert "red" in server.ask(draw("red", "circle"), "What is in this picture?")


def test_a_drain_finishes_what_runs_and_refuses_what_comes(server: Server) -> None:
    with server.client() as client:
        stream = client.chat.completions.create(
            model="internvl-demo",
            messages=[{"role": "user", "content": "Hello!"}],
            stream=True,
            **LONG,
        )
        chunks = iter(stream)
        next(chunks)
        os.kill(server.process.pid, signal.SIGTERM)
        server.wait_for_status("/ready", 503, deadline=10)
        assert httpx.get(server.url + "/live").status_code == 200
        with pytest.raises(openai.InternalServerError) as refused:
            server.ask("Hello!")
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    server.process.wait(30)
    assert server.process.returncode == 0


def test_no_process_outlives_a_killed_server(server: Server) -> None:
    children = server.children("engine") + server.children("preprocessing.worker")
    assert len(children) >= 2
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
