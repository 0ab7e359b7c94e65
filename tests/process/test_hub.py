"""Checkpoints by name: fetched from a hub, found again without one, and never asked for where a
path was meant. The hub is a stand-in that speaks as much of its protocol as the library asks for.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.hub import is_complete
from tests.checkpoints import make_checkpoint

NAME, COMMIT = "OpenGVLab/InternVL3-0B", "a" * 40
UNREAD = {"modeling_internvl_chat.py", "pytorch_model.bin"}


class Hub(http.server.ThreadingHTTPServer):
    """One model, in ``folder``; ``asked`` has the paths of all requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.asked: list[str] = []
        self.withheld = ""  # the name of a file
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        self.server.keys.add(self.headers["Authorization"])
        files = sorted(self.server.folder.iterdir())
        status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith(f"/api/models/{NAME}/tree/"):
            listed = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                for f in files
            ]
            status, headers, body = 200, {}, json.dumps(listed).encode()
        elif path.startswith(f"/api/models/{NAME}"):
            facts = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            status, headers, body = 200, {}, json.dumps(facts).encode()
        elif path.startswith(f"/{NAME}/resolve/") and Path(path).name == self.server.withheld:
            status, headers = 403, {}
        elif path.startswith(f"/{NAME}/resolve/"):
            body = (self.server.folder / Path(path).name).read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            status, headers = 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def model_hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('code of the checkpoint')")
    (folder / "pytorch_model.bin").write_bytes(b"no weights of ours")
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def run(cache: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Python, in a place without anything."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    cache.mkdir(exist_ok=True)
    command = [sys.executable, *words]
    return subprocess.run(
        command, env=environment, cwd=cache, capture_output=True, text=True, check=False, timeout=90
    )


def plan(model: str, cache: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`internvl plan`, which fetches small files."""
    memory = ("--gpu-memory", "1GiB")
    return run(cache, endpoint, "-m", "server", "plan", model, *memory, *words)


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*")}


def test_a_model_is_fetched_once_and_found_without_the_hub(model_hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = plan(NAME, cache, model_hub.url)
    assert done.returncode == 0, done.stderr
    assert "It fits." in done.stdout
    assert {"config.json", "tokenizer.json"} <= names(cache)
    assert not names(cache) & {"model.safetensors", *UNREAD}
    before = len(model_hub.asked)
    for endpoint in (model_hub.url, "http://127.0.0.1:1"):  # where nobody listens
        again = plan(NAME, cache, endpoint, "--revision", COMMIT)
        assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert not [path for path in model_hub.asked[before:] if "/resolve/" in path]


def test_weights_are_fetched_and_no_code(model_hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = f"from server.hub import fetch; print(fetch({NAME!r}, ''))"
    for endpoint in (model_hub.url, "http://127.0.0.1:1"):
        done = run(cache, endpoint, "-c", code)
        assert done.returncode == 0, done.stderr
        stored = Path(done.stdout.strip(), "model.safetensors").read_bytes()
        assert stored == (model_hub.folder / "model.safetensors").read_bytes()
    assert not names(cache) & UNREAD


def test_what_cannot_be_fetched_is_said_in_a_line(model_hub: Hub, tmp_path: Path) -> None:
    for model, endpoint in (("Nobody/nothing", model_hub.url), (NAME, "http://127.0.0.1:1")):
        done = plan(model, tmp_path / "cache", endpoint)
        assert done.returncode == 2
        assert f"--model: {model} is no folder here, and {model} cannot be fetched: " in done.stderr
        assert "Traceback" not in done.stderr


def test_paths_are_never_asked_for(model_hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    for path in ("models/mistyped", "./a/b", "/a/b", "~/nothing", "a/b/c", "nothing", "../a"):
        done = plan(path, cache, model_hub.url)
        assert done.returncode == 2
        assert "is not a checkpoint folder" in done.stderr
    assert model_hub.asked == []


def fetch(cache: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    return run(cache, endpoint, "-m", "server", "fetch", *words)


def test_a_folder_is_filled_once_and_then_asks_nobody(model_hub: Hub, tmp_path: Path) -> None:
    cache, to = tmp_path / "cache", tmp_path / "volume" / "model"
    for endpoint in (model_hub.url, "http://127.0.0.1:1"):
        done = fetch(cache, endpoint, NAME, "--to", str(to))
        assert (done.returncode, done.stdout) == (0, f"{to}\n"), done.stderr
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (to / file).read_bytes() == (model_hub.folder / file).read_bytes()
    assert not names(to) & UNREAD
    assert "model.safetensors" not in names(cache)
    waited = fetch(cache, "http://127.0.0.1:1", NAME, "--to", str(to), "--wait")
    assert (waited.returncode, waited.stdout) == (0, f"{to}\n")


def test_a_token_is_read_from_a_file_as_secrets_are_mounted(
    model_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_secret\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    done = fetch(tmp_path / "cache", model_hub.url, NAME, "--to", str(tmp_path / "volume"))
    assert done.returncode == 0, done.stderr
    assert model_hub.keys == {"Bearer hf_secret"}


def test_several_may_fetch_into_one_folder_at_once(model_hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "volume"
    with ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(fetch, tmp_path / f"cache{i}", model_hub.url, NAME, "--to", str(to))
            for i in range(3)
        ]
        for call in calls:
            assert call.result().returncode == 0, call.result().stderr
    weights = (model_hub.folder / "model.safetensors").read_bytes()
    assert (to / "model.safetensors").read_bytes() == weights


def test_a_fetch_that_was_interrupted_goes_on(model_hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "volume"
    model_hub.withheld = "model.safetensors"
    failed = fetch(tmp_path / "cache", model_hub.url, NAME, "--to", str(to))
    assert failed.returncode == 2
    assert f"{NAME} cannot be fetched: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not is_complete(to, NAME, "")
    model_hub.withheld = ""
    done = fetch(tmp_path / "cache", model_hub.url, NAME, "--to", str(to))
    assert done.returncode == 0, done.stderr
    weights = model_hub.folder / "model.safetensors"
    assert (to / "model.safetensors").read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("reason", ["nobody", "unknown"])
def test_a_folder_is_not_complete_because_the_hub_does_not_say_what_is_missing(
    model_hub: Hub, tmp_path: Path, reason: str
) -> None:
    name, endpoint = (
        (NAME, "http://127.0.0.1:1") if reason == "nobody" else ("Nobody/nothing", model_hub.url)
    )
    to = tmp_path / "volume"
    for _ in range(2):
        failed = fetch(tmp_path / "cache", endpoint, name, "--to", str(to))
        assert failed.returncode == 2, failed.stdout
        assert f"{name} cannot be fetched: " in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not is_complete(to, name, "")


def test_whoever_waits_goes_on_when_the_folder_is_complete(model_hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "volume"
    command = [sys.executable, "-m", "server", "fetch", NAME, "--to", str(to), "--wait"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        try:
            assert waiting.stderr is not None
            assert "waiting until" in waiting.stderr.readline()
            done = fetch(tmp_path / "cache", model_hub.url, NAME, "--to", str(to))
            assert done.returncode == 0, done.stderr
            out, _ = waiting.communicate(timeout=60)
        finally:
            waiting.kill()
    assert (waiting.returncode, out) == (0, f"{to}\n")


def test_a_folder_with_something_else_is_left_alone(model_hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other, mine = tmp_path / "other", tmp_path / "mine"
    assert fetch(cache, model_hub.url, NAME, "--to", str(other)).returncode == 0
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    asked = len(model_hub.asked)
    for folder, words in ((other, ["--revision", COMMIT]), (mine, []), (mine / "letter.txt", [])):
        refused = fetch(cache, model_hub.url, NAME, "--to", str(folder), *words)
        assert refused.returncode == 2
        assert "internvl fetch: --to: " in refused.stderr
        assert str(folder) in refused.stderr
    for words in (["/no/name"], [NAME, "--wait"]):
        refused = fetch(cache, model_hub.url, *words)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
    assert len(model_hub.asked) == asked
