"""``internvl bench`` as a process: what it sends, and that it says what came of it."""

import base64
import io
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.scripted_api import Answer, Api
from tests.servers import ROOT, Server


def answered(body: Any, pieces: int = 3) -> Answer:
    """As a server does whose tokens are words."""
    content = body["messages"][0]["content"]
    words = sum(len(part["text"].split()) for part in content if part["type"] == "text")

    def events() -> Iterator[bytes]:
        for index in range(pieces):
            yield event(choices=[{"delta": {"content": str(index)}}])
        yield event(usage={"prompt_tokens": words, "completion_tokens": pieces})
        yield b"data: [DONE]\n\n"

    return 200, {}, events()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": []} | fields).encode() + b"\n\n"


def bench(*words: str, status: int = 0) -> tuple[dict[str, Any], str]:
    """The figures, and what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "server", "bench", "--out", "-", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout or "{}"), done.stderr


def measured(api: Api) -> list[Any]:
    """What was asked but for the two first requests, which find out how long a word is."""
    return [body["messages"][0]["content"] for body in api.asked[2:]]


def test_the_same_seed_sends_the_same_requests() -> None:
    sent = []
    for seed in ("1", "1", "2"):
        with Api(lambda _, body: answered(body)) as api:
            figures, _ = bench("--url", api.url, "--seed", seed, "--requests", "3")
        assert len(measured(api)) == 5  # two are the warm-up
        sent.append(sorted(map(json.dumps, measured(api))))
        assert len(set(sent[-1])) == 5
        assert (figures["requests"], figures["output_tokens"]) == (3, 9)
        assert figures["prompt_tokens"] == 3 * 128
        assert (figures["model"], figures["seed"]) == ("tiny", int(seed))
    assert sent[0] == sent[1] != sent[2]


def test_pictures_have_the_size_that_was_asked_for() -> None:
    words = ("--picture", "40x30", "--pictures", "2", "--warm-up", "1", "--requests", "2")
    with Api(lambda _, body: answered(body)) as api:
        bench("--url", api.url, *words)
        other = measured(api)
        api.asked.clear()
        bench("--url", api.url, *words, "--same-picture", "--shared-tokens", "16")
        same = measured(api)
    for contents, different in ((other, 6), (same, 4)):
        urls = [part["image_url"]["url"] for content in contents for part in content[:2]]
        assert len(set(urls)) == different
        for url in urls:
            assert shown(url).size == (40, 30)
    begins = {content[2]["text"] for content in same[-2:]}
    assert len(begins) == 1
    assert len(begins.pop().split()) == 16


def shown(url: str) -> Image.Image:
    kind, _, data = url.partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{(picture.format or '').lower()}"
    return picture


def test_photographs_are_jpegs_unlike_each_other() -> None:
    words = ("--photographs", "--picture", "640x480", "--requests", "2", "--warm-up", "1")
    with Api(lambda _, body: answered(body)) as api:
        bench("--url", api.url, *words)
        urls = [content[0]["image_url"]["url"] for content in measured(api)]
    pictures = [shown(url) for url in urls]
    assert [(picture.format, picture.size) for picture in pictures] == [("JPEG", (640, 480))] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    # About as many bytes per pixel as a camera's files have; noise has more than two.
    assert all(0.2 < len(url) * 3 / 4 / (640 * 480) < 0.8 for url in urls)


class Running:
    """Counts the requests that are answered at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.most = 0

    def begin(self) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)

    def answered(self, body: Any) -> Answer:
        """Behind its last piece the next may come."""
        status, headers, events = answered(body)

        def pieces() -> Iterator[bytes]:
            *begin, end = events
            yield from begin
            with self._lock:
                self._now -= 1
            yield end

        return status, headers, pieces()


def test_no_more_are_sent_at_once_than_was_said() -> None:
    running = Running()

    def answer(_: str, body: Any) -> Answer:
        running.begin()
        return running.answered(body)

    with Api(answer) as api:
        bench("--url", api.url, "--concurrency", "3", "--requests", "30")
    assert running.most <= 3


@pytest.mark.parametrize("load", [("--concurrency", "5"), ("--rate", "1000")])
def test_several_processes_share_the_requests(load: tuple[str, str]) -> None:
    """Together they send what one sends, and have as many requests at once as it has."""
    at_once = int(load[1]) if load[0] == "--concurrency" else 12
    all_here = threading.Barrier(at_once)

    def answer(_: str, body: Any) -> Answer:
        if len(api.asked) <= 3:
            return answered(body)  # neither the words' lengths nor the warm-up is measured
        running.begin()
        if len(api.asked) <= 3 + at_once:
            all_here.wait(60)
        return running.answered(body)

    sent = []
    for count in ("1", "3"):
        running = Running()
        with Api(answer) as api:
            words = (*load, "--requests", "12", "--warm-up", "1", "--processes", count)
            figures, _ = bench("--url", api.url, *words)
        assert (figures["requests"], figures["output_tokens"]) == (12, 36)
        assert running.most == at_once
        assert figures["client_busy"] > 0
        sent.append(sorted(map(json.dumps, measured(api))))
    assert sent[0] == sent[1]


def test_what_fails_in_several_processes_is_counted_together() -> None:
    count = itertools.count()

    def answer(_: str, body: Any) -> Answer:
        index = next(count)
        refused: Answer = (500, {}, {"error": {"message": "it broke"}})
        return refused if index > 2 and index % 2 else answered(body)

    with Api(answer) as api:
        words = ("--requests", "8", "--warm-up", "1", "--processes", "4")
        figures, _ = bench("--url", api.url, *words, status=1)
    assert (figures["requests"], figures["errors"]) == (4, {"500: it broke": 4})


def test_a_rate_does_not_wait_for_answers() -> None:
    """No request of the measured ones is answered before all have come."""
    all_here = threading.Barrier(8)

    def answer(_: str, body: Any) -> Answer:
        if body["max_tokens"] == 64 and len(api.asked) > 3:
            all_here.wait(60)
        return answered(body)

    with Api(answer) as api:
        figures, _ = bench("--url", api.url, "--rate", "100", "--requests", "8", "--warm-up", "1")
    assert (figures["requests"], figures["failed"]) == (8, 0)
    assert figures["load"]["rate"] == 100


def test_what_fails_is_counted_and_told_apart(tmp_path: Path) -> None:
    def answer(_: str, body: Any) -> Answer:
        kind = len(api.asked) % 4 if len(api.asked) > 3 else 0
        return (
            answered(body),
            (500, {}, {"error": {"message": "it\x1b[2J broke"}}),
            (200, {}, iter([event(error={"message": "cut"})])),
            (200, {}, iter([b"data: {what\n\n"])),
        )[kind]

    words = ("--concurrency", "1", "--requests", "12", "--warm-up", "1")
    with Api(answer) as api:
        figures, _ = bench("--url", api.url, *words, status=1)
        assert (figures["requests"], figures["failed"]) == (3, 9)
        assert sorted(figures["errors"].values()) == [3, 3, 3]
        assert figures["ttft_count"] == 3
        assert figures["ttft_p90_ms"] is None
        assert "\x1b" not in "".join(figures["errors"])
        file = tmp_path / "figures.json"
        api.asked.clear()
        done = subprocess.run(
            [*(sys.executable, "-m", "server", "bench", "--url", api.url, *words), "--out", file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "3 requests answered, 9 failed, 1 at once" in done.stdout
    assert "failed, 3 times: 500: it" in done.stdout
    assert "too few values" in done.stdout
    assert json.loads(file.read_text())["failed"] == 9


def test_a_real_server_is_measured(demo_server: Server) -> None:
    words = ("--requests", "10", "--input-tokens", "8", "--output-tokens", "4", "--picture", "64")
    figures, told = bench("--url", demo_server.url, *words)
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (10, 0, 40)
    assert figures["model"] == "internvl-demo"
    assert figures["server"] == demo_server.url
    assert 0 < figures["ttft_p50_ms"] <= figures["e2e_p50_ms"] <= figures["e2e_p90_ms"]
    assert told == ""


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--picture", "big"], 2, "no size, such as 448"),
        (["--rate", "0"], 2, "no rate above 0"),
        (["--rate", "1", "--concurrency", "2"], 2, "not allowed with"),
        (["--seed", "-1"], 2, "no number from 0"),
        (["--url", "http://127.0.0.1:9"], 1, "no server answers"),
        (["--out", "/nowhere/at/all"], 2, "there is no folder"),
    ],
)
def test_what_cannot_be_measured_says_why(words: list[str], status: int, says: str) -> None:
    _, told = bench(*words, status=status)
    assert says in told


def test_a_refusal_of_the_first_request_ends_it(demo_server: Server) -> None:
    _, told = bench("--url", demo_server.url, "--model", "another", status=1)
    assert told.startswith("internvl bench: 404: ")
    assert told.count("\n") == 1
