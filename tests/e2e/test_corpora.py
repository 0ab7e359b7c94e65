"""Everything that people and attackers send, over HTTP to one server: each file is answered or
refused within its deadline, and afterwards the server is as it was."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.process.test_broken_videos import LIES, NO_VIDEOS, SOURCES, source
from tests.process.test_picture_bombs import BOMBS, POLYGLOTS
from tests.servers import Server, data_uri, draw

PICTURE_TIMEOUT, VIDEO_TIMEOUT = 2.0, 6.0
# Of waiting for a worker behind others that take all their time, and of the machine.
PATIENCE = 60.0
MOST_GROWTH = 300 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("corpora") / "log.txt",
        ["--media-timeout", str(PICTURE_TIMEOUT), "--video-timeout", str(VIDEO_TIMEOUT),
         "--media-workers", "2", "--tile-cache-bytes", str(16 << 20)],
    )  # fmt: skip
    yield server
    server.close()


def resident(pid: int) -> int:
    """Bytes that a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def sweep(server: Server, kind: str, files: dict[str, Callable[[], bytes]]) -> Counter[str]:
    """Send all files, four at a time; how often each outcome was met."""
    field = f"{kind}_url"

    def send(client: httpx.Client, name: str) -> str:
        encoded = files[name]()
        part = {"type": field, field: {"url": data_uri(encoded, f"{kind}/any")}}
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}],
            "max_tokens": 1,
        }
        began = time.monotonic()
        answer = client.post(server.url + "/v1/chat/completions", json=body)
        assert time.monotonic() - began < PATIENCE + VIDEO_TIMEOUT, name
        if answer.status_code == 200:
            return "shown"
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500, (name, answer.status_code, error)
        assert set(error) == {"message", "type", "param", "code"}
        if error["code"] != "request_too_large":  # then nothing of it was read
            assert error["param"] == f"messages[0].content[0].{field}.url", (name, error)
        return str(error["code"])

    before = resident(server.process.pid)
    with httpx.Client(timeout=PATIENCE + VIDEO_TIMEOUT + 30) as client:
        with ThreadPoolExecutor(4) as threads:
            found = Counter(threads.map(lambda name: send(client, name), files))
        assert client.get(server.url + "/ready").status_code == 200
    assert resident(server.process.pid) - before < MOST_GROWTH
    answer = server.ask(draw("red", "circle"), "What is in this picture?")
    assert answer == "A red circle."
    assert server.metric("internvl_engine_restarts_total") == 0
    return found


def test_pictures_of_pillows_own_tests(server: Server, corpus: list[Path]) -> None:
    corpus = corpus[::3]  # tests/process/test_picture_corpus.py has all of them
    found = sweep(server, "image", {path.name: path.read_bytes for path in corpus})
    assert found["shown"] > len(corpus) // 2
    known = {"shown", "unsupported_media", "invalid_media", "media_too_large", "media_timeout"}
    assert found.keys() <= known
    # A busy machine may let one overrun its deadline; none may die of a picture.
    slow = server.metric('internvl_sandbox_kills_total{reason="timeout"}')
    assert server.metric("internvl_decode_workers_replaced_total") == slow
    assert slow <= found["media_timeout"]


def test_bombs_and_polyglots(server: Server) -> None:
    bombs = dict(BOMBS)
    for name, (encoded, _) in POLYGLOTS.items():
        bombs[name] = lambda encoded=encoded: encoded
    found = sweep(server, "image", bombs)
    assert sum(found.values()) == len(bombs)


def test_videos_and_what_only_looks_like_one(server: Server) -> None:
    files: dict[str, Callable[[], bytes]] = {name: make for name, (make, _) in LIES.items()}
    for name, make in NO_VIDEOS.items():
        files[name] = make if callable(make) else lambda encoded=make: encoded
    for name in SOURCES:
        files[name] = lambda name=name: source(name)
        for cut in (1, 5, 9):
            files[f"{cut} tenths of {name}"] = lambda name=name, cut=cut: source(name)[
                : len(source(name)) * cut // 10
            ]
    found = sweep(server, "video", files)
    assert found["shown"] >= len(SOURCES)
    assert len(files) > 80
