"""Servers are replaced while clients ask: no request fails and no stream is cut, though no client
asks twice."""

import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.nginx import Names, composed, found, serving
from tests.servers import Server, data_uri, draw, encode, free_port, part

# More than sockets hold: a server that refuses it at once has not read it.
NOISE = data_uri(encode(Image.frombytes("RGB", (600, 600), os.urandom(3 * 600 * 600))))
LARGE = {"type": "image_url", "image_url": {"url": NOISE, "detail": "low"}}
PICTURES = [[], [part(draw("red", "circle", (300, 200)))], [LARGE]]


def questions() -> Iterator[bytes]:
    """Without and with a picture, streamed or not, of few tokens or many."""
    for picture, stream, tokens in itertools.product(PICTURES, (False, True), (10, 100)):
        asked = {
            "messages": [{"role": "user", "content": [*picture, part("Hello!")]}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": stream,
        }
        yield json.dumps(asked).encode()


QUESTIONS = list(questions())


def ask(client: httpx.Client, question: bytes) -> str:
    """The whole answer; anything less fails."""
    answer = client.post("/v1/chat/completions", content=question)
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        (choice,) = answer.json()["choices"]
        text = choice["message"]["content"]
    else:
        *events, last = [data[6:] for data in answer.text.split("\n\n") if data[:6] == "data: "]
        assert last == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        choice = choices[-1]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert choice["finish_reason"] == "length"
    return str(text)


class Load:
    """Clients that ask and ask, each of them all the questions from another one on."""

    def __init__(self, url: str, clients: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._answers = [self._pool.submit(self._ask, number) for number in range(clients)]

    def _ask(self, number: int) -> list[tuple[int, str]]:
        answers: list[tuple[int, str]] = []
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                which = (number + len(answers)) % len(QUESTIONS)
                answers.append((which, ask(client, QUESTIONS[which])))
        return answers

    def is_well(self) -> bool:
        """True; raises what a client has seen."""
        return not any(answer.result() for answer in self._answers if answer.done())

    def stop(self) -> list[tuple[int, str]]:
        """Which questions were asked, and the answers."""
        self._stop.set()
        with self._pool:
            return [pair for answers in self._answers for pair in answers.result()]


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(found() is None, reason="nginx is not installed")
def test_nobody_notices_that_all_servers_behind_nginx_are_replaced(tmp_path: Path) -> None:
    """By the settings of docker-compose.yml, on addresses that come from DNS as there."""
    port, front = free_port(), free_port()
    log = tmp_path / "access.log"

    def start(address: str) -> Server:
        server = Server(tmp_path / f"{address}.txt", at=(address, port))
        stack.callback(server.close)
        return server

    def answered(address: str) -> int:
        return len(re.findall(rf"{address}:\d+ \(200\)", log.read_text()))

    with ExitStack() as stack:
        names = stack.enter_context(closing(Names()))
        stack.enter_context(serving(tmp_path, front, composed(tmp_path, front, names.port, port)))
        with ThreadPoolExecutor() as pool:
            first = ["127.0.0.2", "127.0.0.3"]
            servers = dict(zip(first, pool.map(start, first), strict=True))
        names.addresses = tuple(servers)
        with httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=60) as client:
            wait_for(lambda: client.get("/ready").status_code == 200)
        load = Load(f"http://127.0.0.1:{front}", 4)
        stack.callback(load.stop)

        def takes_part(address: str) -> None:
            seen = answered(address)
            wait_for(lambda: load.is_well() and answered(address) > seen + 2)

        # One comes back at its address, the other elsewhere.
        for old, new in (("127.0.0.2", "127.0.0.2"), ("127.0.0.3", "127.0.0.4")):
            takes_part(old)
            server = servers.pop(old)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            names.addresses = tuple(servers)
            servers[new] = start(new)
            names.addresses = tuple(servers)
            takes_part(new)
        answers = load.stop()
    assert len(set(answers)) == len(QUESTIONS), "the same question had two answers"
    statuses = re.findall(r'"POST [^"]+" (\d+) .* \(([\d, ]+)\) ', log.read_text())
    assert {status for status, _ in statuses} == {"200"}
    assert "503, 200" in {tried for _, tried in statuses}, "no server was asked while it drained"
