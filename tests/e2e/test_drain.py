"""SIGTERM while fifty answers are being streamed: what is promised by a drain, to all of them."""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from tests.servers import Server

COUNT = 50


def stream(server: Server, begun: threading.Barrier, tokens: int) -> tuple[list[Any], float]:
    """The events of an answer, and when it ended. Waits at ``begun`` for its first words."""
    asked = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    events: list[Any] = []
    url = server.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=asked, timeout=120) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
            if len(events) == 2:  # the first one names the role
                begun.wait(120)
    return events, time.monotonic()


def terminated(server: Server, tokens: int) -> tuple[float, list[tuple[list[Any], float]]]:
    """When SIGTERM was sent to a server that streams, and what became of the streams."""
    begun = threading.Barrier(COUNT + 1)
    with ThreadPoolExecutor(COUNT) as pool:
        answers = [pool.submit(stream, server, begun, tokens) for _ in range(COUNT)]
        begun.wait(120)
        sent = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        ended = [answer.result() for answer in answers]
    assert server.process.wait(60) == 0
    return sent, ended


def test_fifty_streams_end_whole_after_sigterm(tmp_path: Path) -> None:
    with closing(Server(tmp_path / "log.txt", ["--drain-timeout", "300"])) as server:
        _, ended = terminated(server, 60)
    for (*events, last), _ in ended:
        assert last == "[DONE]"
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert not any("error" in event for event in events)


def test_streams_that_outlive_the_drain_are_told_so_and_none_before_its_end(
    tmp_path: Path,
) -> None:
    with closing(Server(tmp_path / "log.txt", ["--drain-timeout", "1.5"])) as server:
        sent, ended = terminated(server, 3500)
    for (*events, error, last), when in ended:
        assert when - sent >= 1.5
        assert last == "[DONE]"
        assert error["error"]["code"] == "unavailable"
        assert error["error"]["message"] == "The server is shutting down."
        assert not any(event["choices"][0]["finish_reason"] for event in events)
