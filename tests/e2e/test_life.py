"""Through real processes: clients leave, workers and engines die, the server is told to stop."""

import collections
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.servers import Server, data_uri, draw, encode

LONG = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the test's own, because the test breaks it."""
    server = Server(tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.close()


def idle(server: Server) -> None:
    server.wait_for_metric("internvl_kv_blocks_used", 0)
    server.wait_for_metric("internvl_num_requests_running", 0)
    server.wait_for_metric("internvl_num_requests_waiting", 0)


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


def test_killed_decode_workers_cost_nothing(server: Server) -> None:
    workers = server.children("preprocessing.worker")
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for _ in range(4):
        assert "red" in server.ask(draw("red", "circle"), "What is in this picture?")


LISTS = {"type": "array", "items": {"type": "integer"}, "minItems": 20, "maxItems": 20}


def conversation(number: int) -> dict[str, Any]:
    """Text or a picture, greedy or seeded; some with two answers, some held to a schema."""
    content: Any = f"Hello number {number}!"
    if number % 2:
        url = data_uri(encode(draw("red", "circle", (300, 200))))
        picture = {"type": "image_url", "image_url": {"url": url}}
        content = [picture, {"type": "text", "text": content}]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0.0}
    if number % 4 > 1:
        asked |= {"temperature": 1.0, "seed": number + 1}
    if number % 5 == 3:
        asked["n"] = 2
    if number % 5 == 4:
        schema = {"name": "numbers", "schema": LISTS, "strict": True}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    else:
        asked["extra_body"] = {"ignore_eos": True}
    return asked


def stream(
    server: Server, number: int, begun: threading.Barrier | None = None, **options: Any
) -> tuple[dict[int, str], int]:
    """Texts and number of tokens of one answer; waits at ``begun`` for its first token."""
    texts: dict[int, str] = collections.defaultdict(str)
    usage = None
    with server.client() as client:
        for chunk in client.chat.completions.create(
            model="internvl-demo",
            stream=True,
            stream_options={"include_usage": True},
            **{"max_tokens": 60} | conversation(number) | options,
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                if choice.delta.content and begun is not None and not any(texts.values()):
                    begun.wait(120)
                texts[choice.index] += choice.delta.content or ""
    assert usage is not None
    return texts, usage.completion_tokens


@pytest.mark.parametrize("mode", ["off", "on"])
def test_no_client_notices_that_the_engine_was_killed(
    tmp_path_factory: pytest.TempPathFactory, mode: str
) -> None:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = Server(log, ["--async-scheduling", mode])
    try:
        kill_the_engine(server)
    finally:
        server.close()


def kill_the_engine(server: Server) -> None:
    count = 20
    (engine,) = server.children("engine")
    begun = threading.Barrier(count, lambda: os.kill(engine, signal.SIGKILL))
    with ThreadPoolExecutor(count) as pool:
        whole = list(pool.map(lambda number: stream(server, number), range(count)))
        answers = [pool.submit(stream, server, number, begun) for number in range(count)]
        server.wait_for_status("/ready", 503)
        assert [answer.result(240) for answer in answers] == whole
    for number, (texts, tokens) in enumerate(whole):
        if number % 5 == 4:
            assert tokens > 40  # twenty numbers, or cut off
        else:
            assert tokens == 60 * len(texts) == 60 * conversation(number).get("n", 1)
    server.wait_for_status("/ready", 200)
    server.wait_for_metric("internvl_engine_restarts_total", 1)
    assert server.children("engine") != [engine]
    assert "red" in server.ask(draw("red", "circle"), "What is in this picture?")


def connected(server: Server, client: socket.socket) -> bool:
    """Whether the server's end of a connection exists, by the kernel's table."""
    ports = f":{server.port:04X}", f":{client.getsockname()[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(ports[0]) and row[2].endswith(ports[1]) for row in rows)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_a_client_that_reads_nothing_keeps_neither_permit_nor_connection(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server = Server(tmp_path_factory.mktemp("server") / "log.txt", ["--send-timeout", "2"])
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Hello!"}],
            "n": 8,
            "stream": True,
            "max_tokens": 1500,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 20,
        }
    )
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            head = f"Host: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
            server.wait_for_metric("internvl_requests_in_flight", 1)
            server.wait_for_metric("internvl_requests_in_flight", 0, deadline=120)
            assert server.metric("internvl_request_success_total") is not None
            end = time.monotonic() + 60
            while connected(server, client):
                assert time.monotonic() < end, "the connection is still there"
                time.sleep(0.05)
        idle(server)
    finally:
        server.close()


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
        with server.paused():
            os.kill(server.process.pid, signal.SIGTERM)
            server.wait_for_status("/ready", 503)
            assert httpx.get(server.url + "/live", timeout=60).status_code == 200
            with pytest.raises(openai.InternalServerError) as refused:
                server.ask("Hello!")
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    server.process.wait(60)
    assert server.process.returncode == 0


def test_no_process_outlives_a_killed_server(server: Server) -> None:
    children = server.children("engine") + server.children("preprocessing.worker")
    assert len(children) >= 2
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 60
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
