"""``internvl run-batch`` as a process: what it writes, when it is killed, when it is refused."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_api import Answer, Api
from tests.servers import ROOT, data_uri, draw, encode, part

URL = "/v1/chat/completions"
USED = {"usage": {"completion_tokens": 5}}


def line(name: Any, body: Any = None, url: str = URL, method: str = "POST") -> str:
    body = {"messages": [{"role": "user", "content": name}]} if body is None else body
    return json.dumps({"custom_id": name, "method": method, "url": url, "body": body}) + "\n"


def said(body: Any) -> str:
    """The only message of a body."""
    return str(body["messages"][0]["content"])


class Batch:
    """An input and an output in a folder."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.words = ["-i", str(self.input), "-o", str(self.output)]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "server", "run-batch", *self.words, *words]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*words),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *words: str, status: int = 0, **options: Any) -> str:
        """What it said."""
        process = self.start(*words, **options)
        _, told = process.communicate(timeout=120)
        assert process.returncode == status, told
        return told

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.output.read_text().splitlines()]

    def wait_for_lines(self, count: int) -> None:
        end = time.monotonic() + 60
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < count:
            assert time.monotonic() < end, "the lines never came"
            time.sleep(0.01)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def test_a_batch_that_was_killed_goes_on_and_asks_nothing_twice(batch: Batch) -> None:
    names = [f"line {number}" for number in range(40)]
    batch.input.write_text("".join(map(line, names)))
    go_on, open_ones = threading.Event(), threading.Semaphore(10)

    def answer(_: str, body: Any) -> Answer:
        if not open_ones.acquire(blocking=False):
            go_on.wait(60)
        return 200, {"x-request-id": "r1"}, {"said": said(body)} | USED

    with Api(answer) as api:
        process = batch.start("--url", api.url, "--concurrency", "4")
        batch.wait_for_lines(10)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished = {entry["custom_id"] for entry in batch.lines}
        assert len(finished) == 10
        with batch.output.open("a") as file:
            file.write('{"id":"batch_req_12345","custom_id":"line 3')  # as if cut off by the kill
        go_on.set()
        told = batch.run("--url", api.url)
    assert "was torn off" in told
    assert "30 answered, 0 failed, 10 done before; 150 tokens" in told
    assert sorted(entry["custom_id"] for entry in batch.lines) == sorted(names)
    for entry in batch.lines:
        assert entry["id"].startswith("batch_req_")
        assert entry["error"] is None
        assert entry["response"]["status_code"] == 200
        assert entry["response"]["request_id"] == "r1"
        assert entry["response"]["body"]["said"] == entry["custom_id"]
    asked = Counter(said(body) for body in api.asked)
    assert {asked[name] for name in finished} == {1}
    # And nothing needs a server now.
    assert "0 answered, 0 failed, 40 done before" in batch.run()


def test_lines_that_cannot_be_used_are_told_and_stop_nothing(batch: Batch) -> None:
    lines = [
        "\ufeff" + line("first"),
        "\n",
        "{torn\n",
        line("first"),
        line("get", method="GET"),
        line("where", url="/v1/embeddings"),
        line("stream", {"stream": True}),
        line("later", {"background": True}),
        line("no body", []),
        '{"method": "POST"}\n',
        line(7),
        line(""),
        line("deep", []).replace("[]", "[" * 100_000 + "]" * 100_000),
        line("last").strip(),
    ]
    batch.input.write_text("".join(lines))
    with Api(lambda *_: (200, {}, USED)) as api:
        told = batch.run("--url", api.url, status=1)
        assert "2 answered, 11 failed" in told
        found = {entry["error"]["line"]: entry for entry in batch.lines if entry["error"]}
        assert sorted(found) == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
        names = [found[number]["custom_id"] for number in sorted(found)]
        assert names == [None, None, "get", "where", "stream", "later", "no body", *[None] * 4]
        for number, word in {3: "JSON", 4: "'first'", 5: "'GET'", 6: "/v1/embeddings"}.items():
            message = found[number]["error"]["message"]
            assert message.startswith(f"line {number}: ")
            assert word in message
        assert found[9]["response"] is None
        # The status is that of all that is there, and nothing is told twice.
        assert "0 answered, 0 failed, 13 done before" in batch.run("--url", api.url, status=1)
    assert len(batch.lines) == 13
    assert len(api.asked) == 2


def test_what_is_refused_for_now_is_asked_again_when_the_server_says(batch: Batch) -> None:
    batch.input.write_text("".join(map(line, "abc")))
    refused: dict[str, float] = {}
    waited: dict[str, float] = {}

    def answer(_: str, body: Any) -> Answer:
        name = said(body)
        if name not in refused:
            refused[name] = time.monotonic()
            status = {"a": 429, "b": 503, "c": 502}[name]
            return status, {"retry-after": "1"} if status == 429 else {}, {"error": {}}
        waited[name] = time.monotonic() - refused[name]
        return 200, {}, USED

    with Api(answer) as api:
        assert "3 answered, 0 failed" in batch.run("--url", api.url)
    assert waited["a"] >= 1
    assert len(api.asked) == 6


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((503, {"retry-after": "3600"}, {"error": {"message": "come\n\x1b[2Jback"}}), "503: come"),
        ((401, {}, {"error": {"message": "The API key is wrong."}}), "401: The API key is wrong."),
    ],
)
def test_what_nobody_can_answer_now_is_left_for_another_run(
    batch: Batch, reply: Answer, says: str
) -> None:
    batch.input.write_text("".join(line(f"{number}") for number in range(100)))
    with Api(lambda *_: reply) as api:
        told = batch.run("--url", api.url, "--concurrency", "2", status=3)
        assert says in told
        assert "\x1b" not in told
        assert "goes on" in told
        assert batch.lines == []
        assert len(api.asked) < 10


def test_an_answer_that_is_packed_wrongly_is_no_answer(batch: Batch) -> None:
    batch.input.write_text(line("a"))
    with Api(lambda *_: (200, {"content-encoding": "gzip"}, b"not packed")) as api:
        told = batch.run("--url", api.url, "--patience", "1", status=3)
    assert "Traceback" not in told
    assert batch.lines == []


def test_the_first_signal_finishes_what_is_running(batch: Batch) -> None:
    batch.input.write_text("".join(line(f"{number}") for number in range(100)))
    asked, go_on = threading.Semaphore(0), threading.Event()

    def answer(*_: Any) -> Answer:
        asked.release()
        go_on.wait(60)
        return 200, {}, USED

    with Api(answer) as api:
        process = batch.start("--url", api.url, "--concurrency", "3")
        for _ in range(3):
            assert asked.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "finishing what is running" in process.stderr.readline()
        go_on.set()
        _, told = process.communicate(timeout=60)
        assert process.returncode == 3
        assert "the same command goes on" in told
        assert len(batch.lines) == len(api.asked) == 3
        assert "97 answered" in batch.run("--url", api.url)


def test_a_second_signal_does_not_wait(batch: Batch) -> None:
    batch.input.write_text(line("a"))
    asked, never = threading.Event(), threading.Event()

    def answer(*_: Any) -> Answer:
        asked.set()
        never.wait(60)
        return 200, {}, USED

    with Api(answer) as api:
        process = batch.start("--url", api.url)
        assert asked.wait(60)
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        assert "once more" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        never.set()
    assert process.returncode == 3
    assert "Traceback" not in told
    assert batch.lines == []


def test_a_signal_ends_a_run_that_waits_for_its_input(batch: Batch) -> None:
    batch.words[1] = "-"
    with Api(lambda *_: (200, {}, USED)) as api:
        process = batch.start("--url", api.url, stdin=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(line("a"))
        process.stdin.flush()
        batch.wait_for_lines(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
        assert process.stderr is not None
        told = process.stderr.read()
        process.stdin.close()
        process.stderr.close()
    assert "1 answered" in told
    assert "Traceback" not in told
    assert "Fatal" not in told


def test_an_answer_that_is_no_line_of_json_becomes_one(batch: Batch) -> None:
    bodies: dict[str, Any] = {
        "pretty": json.dumps({"a": [1, {"b": "ü\n"}]}, indent=2).encode(),
        "page": b"<html>\nno \xff gateway",
        "odd": {"usage": [1]},
        "deep": b"[" * 100_000,
    }
    batch.input.write_text("".join(map(line, bodies)))
    with Api(lambda _, body: (200, {}, bodies[said(body)])) as api:
        batch.run("--url", api.url)
    found = {entry["custom_id"]: entry["response"]["body"] for entry in batch.lines}
    assert found["pretty"] == {"a": [1, {"b": "ü\n"}]}
    assert found["odd"] == {"usage": [1]}
    assert "gateway" in found["page"]
    assert found["deep"] == "[" * 10_000


def test_a_file_that_is_no_output_stays_as_it_is(batch: Batch) -> None:
    batch.input.write_text(line("a"))
    for text in ("dear diary", "dear diary\n", '{"a": 1}\n', '{"id":"batch_req_1"}\ndear'):
        batch.output.write_text(text)
        assert "name another file" in batch.run("--url", "http://127.0.0.1:9", status=2)
        assert batch.output.read_text() == text
    batch.output.unlink()
    batch.words[3] = batch.words[1]
    assert "name another file" in batch.run("--url", "http://127.0.0.1:9", status=2)
    assert batch.input.read_text() == line("a")


def test_two_runs_do_not_write_one_file(batch: Batch) -> None:
    batch.input.write_text(line("a"))
    go_on, asked = threading.Event(), threading.Event()

    def answer(*_: Any) -> Answer:
        asked.set()
        go_on.wait(60)
        return 200, {}, USED

    with Api(answer) as api:
        first = batch.start("--url", api.url)
        assert asked.wait(60)
        assert "another run writes" in batch.run("--url", api.url, status=2)
        go_on.set()
        first.communicate(timeout=60)
    assert len(batch.lines) == 1


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9"),
        (["--url", "http://me:word@127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9: "),
        (["--url", "http://127.0.0.1:9", "--api-key", "kéy"], 2, "that no key has"),
        (["--url", "127.0.0.1:9"], 2, "is no address"),
        (["--url", "http://127.0.0.1:9", "--max-num-seqs", "3"], 2, "--max-num-seqs is a setting"),
        (["--api-key", "k"], 2, "--api-key is for"),
        (["--model", "/nowhere/at/all"], 2, "no config.json"),
        (["--i", "/nowhere/at/all"], 2, "No such file"),
        (["--o", "/nowhere/at/all"], 2, "cannot be written"),
    ],
)
def test_what_cannot_begin_says_why_in_a_line(
    batch: Batch, words: list[str], status: int, says: str
) -> None:
    batch.input.write_text(line("a"))
    words = [{"--i": "--input", "--o": "--output"}.get(word, word) for word in words]
    told = batch.run(*words, status=status)
    assert says in told
    assert told.startswith("internvl run-batch: ")
    assert told.count("\n") == 1


def test_a_standard_input_that_is_closed_is_told(batch: Batch) -> None:
    batch.words[1] = "-"
    told = batch.run(status=2, preexec_fn=lambda: os.close(0))
    assert told == "internvl run-batch: --input: -: Bad file descriptor\n"


def test_the_key_is_sent_and_is_no_argument(batch: Batch) -> None:
    batch.input.write_text(line("a"))
    with Api(lambda *_: (200, {}, USED)) as api:
        batch.run("--url", api.url + "/v1/", env=os.environ | {"INTERNVL_API_KEY": "secret,other"})
    assert api.headers[0]["authorization"] == "Bearer secret"


def test_a_terminal_has_a_bar(batch: Batch) -> None:
    batch.input.write_text("".join(line(f"{number}") for number in range(20)))
    ours, theirs = pty.openpty()
    with Api(lambda *_: (200, {}, USED)) as api:
        process = subprocess.Popen(
            batch.command("--url", api.url),
            cwd=ROOT,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = read_all(ours)
        assert process.wait(60) == 0
    assert "20 answered, 0 failed" in shown
    assert "━" in shown
    assert "100%" in shown


def read_all(descriptor: int) -> str:
    parts = []
    with open(descriptor, "rb", buffering=0) as file:
        while True:
            try:
                if not (part := file.read(65536)):
                    break
            except OSError:  # the other end is closed
                break
            parts.append(part)
    return b"".join(parts).decode(errors="replace")


# Prints the most KiB that a command took. What a process was before it became another program
# counts: a child of pytest would have taken as much as pytest.
MOST_MEMORY = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_a_large_input_takes_little_memory(batch: Batch) -> None:
    """100,000 lines of which nearly all are done: each takes a digest, no more."""
    count = 100_000
    with batch.input.open("w") as wanted, batch.output.open("w") as found:
        for number in range(count):
            wanted.write(line(f"line {number}", {"padding": "x" * 400}))
            if number:
                entry = {"id": "batch_req_1", "custom_id": f"line {number}"}
                entry |= {"response": {"status_code": 200, "body": "y" * 400}, "error": None}
                found.write(json.dumps(entry, separators=(",", ":")) + "\n")
    with Api(lambda *_: (200, {}, USED)) as api:
        command = [sys.executable, "-c", MOST_MEMORY, *batch.command("--url", api.url)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert f"1 answered, 0 failed, {count - 1} done before" in done.stderr
    assert len(api.asked) == 1
    assert int(done.stdout) < 200 << 10  # the input alone has 50 MiB


def test_a_server_of_its_own_answers_in_every_api(batch: Batch, tmp_path: Path) -> None:
    picture = draw("red", "circle")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(encode(picture))
    (tmp_path / "outside.png").write_bytes(encode(picture))
    question = "What is in the picture?"

    def shown(url: str) -> list[Any]:
        picture = {"type": "image_url", "image_url": {"url": url}}
        return [{"role": "user", "content": [picture, part(question)]}]

    inside = (tmp_path / "pictures" / "one.png").as_uri()
    outside = (tmp_path / "outside.png").as_uri()
    common = {"model": "internvl-demo", "temperature": 0}
    data = data_uri(encode(picture))
    wanted = [
        line("data", common | {"messages": shown(data)}),
        line("file", common | {"messages": shown(inside)}),
        line("other file", common | {"messages": shown(outside)}),
        line("text", common | {"prompt": "Hello", "max_tokens": 4}, "/v1/completions"),
        line("response", common | {"input": "Hello!"}, "/v1/responses"),
        line(
            "message",
            common | {"max_tokens": 9, "messages": [{"role": "user", "content": "Hello!"}]},
            "/v1/messages",
        ),
        line("broken", common | {"messages": []}),
    ]
    batch.input.write_text("".join(wanted))
    told = batch.run("--allowed-local-media-path", str(tmp_path / "pictures"), status=1)
    assert "5 answered, 2 failed" in told
    found = {entry["custom_id"]: entry["response"] for entry in batch.lines}
    for name in ("data", "file"):
        text = found[name]["body"]["choices"][0]["message"]["content"]
        assert "red" in text
        assert "circle" in text
    assert found["other file"]["status_code"] == 400
    assert found["broken"]["status_code"] == 400
    assert found["text"]["body"]["object"] == "text_completion"
    assert found["response"]["body"]["object"] == "response"
    assert found["message"]["body"]["type"] == "message"
    assert all(entry["response"]["request_id"] for entry in batch.lines)


def test_a_server_of_its_own_ends_with_a_command_that_is_killed(batch: Batch) -> None:
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "model": "internvl-demo"}
    batch.input.write_text("".join(line(f"{n}", body, "/v1/completions") for n in range(200)))
    process = batch.start()
    batch.wait_for_lines(2)
    family = descendants(process.pid)
    assert len(family) >= 2  # the server and its engine, at least
    process.send_signal(signal.SIGKILL)
    process.communicate()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in family):
        assert time.monotonic() < end, "a process goes on without whoever started it"
        time.sleep(0.02)


def test_a_server_that_ends_ends_the_run_which_goes_on_later(batch: Batch) -> None:
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "model": "internvl-demo"}
    batch.input.write_text("".join(line(f"{n}", body, "/v1/completions") for n in range(50)))
    process = batch.start("--concurrency", "2")
    batch.wait_for_lines(2)
    (server,) = children(process.pid)
    os.kill(server, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3, told
    assert "the server has ended" in told
    assert "Traceback" not in told
    done = len(batch.lines)
    assert 2 <= done < 50


def test_a_full_disk_leaves_whole_lines(batch: Batch) -> None:
    batch.input.write_text("".join(line(f"{number}") for number in range(40)))
    with Api(lambda *_: (200, {}, USED)) as api:
        words = [sys.executable, "-m", "server", "run-batch", *batch.words, "--url", api.url]
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 2; exec "$@"', "bash", *words],  # KiB
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 3, done.stderr
        assert "the output cannot be written: File too large" in done.stderr
        assert "Traceback" not in done.stderr
        written = len(batch.lines)
        assert 0 < written < 40
        assert f"{written} answered, 0 failed" in done.stderr
        assert f"{40 - written} answered" in batch.run("--url", api.url)
    assert len({entry["custom_id"] for entry in batch.lines}) == 40


def test_an_input_that_cannot_be_read_says_so(batch: Batch, tmp_path: Path) -> None:
    batch.words[1] = str(tmp_path)
    assert "Is a directory" in batch.run("--url", "http://127.0.0.1:9", status=2)


def descendants(pid: int) -> list[int]:
    own = children(pid)
    return own + [each for child in own for each in descendants(child)]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_urls_are_those_of_the_app_that_generate() -> None:
    from server.batch.lines import URLS
    from server.openapi import ROUTES

    generating = {name.split()[1] for name, form in ROUTES.items() if form.events and form.forms}
    assert set(URLS) == generating
