"""What `helm test` runs, run here against a real server, and against one that answers badly."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.deploy import chart
from tests.deploy.chart import Rendered, container
from tests.servers import Server

pytestmark = chart.needs_helm

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "keys": {"apiKeys": {"values": ["first", "second"]}},
}


@pytest.fixture(scope="module")
def renders() -> dict[str, Rendered]:
    return dict(zip(CASES, chart.render(list(CASES.values())), strict=True))


def run_smoke(
    one: Rendered, port: int, folder: Path, keys: str = ""
) -> subprocess.CompletedProcess[str]:
    """What `helm test` would run, here; the service's name becomes this machine."""
    smoke = container(one.manifests["Pod/smoke"])
    assert smoke["command"] == ["python3", "-c"]
    assert ("volumeMounts" in smoke) == bool(keys)
    file = folder / "keys"
    if keys:
        file.write_text(keys)
    return subprocess.run(
        [sys.executable, "-c", *smoke["args"]],
        env={
            **os.environ,
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(port),
            "API_KEYS": str(file),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_smoke_test_passes_on_the_demo_model(
    renders: dict[str, Rendered], demo_server: Server, tmp_path: Path
) -> None:
    done = run_smoke(renders["default"], demo_server.port, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("internvl-demo: ")


class Stub(BaseHTTPRequestHandler):
    """Answers like a server behind a key; what it answers is the test's choice."""

    words = "red"

    def answer(self) -> None:
        allowed = self.headers.get("Authorization") == "Bearer first" or self.path == "/ready"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = {
            "data": [{"id": "m"}],
            "choices": [{"message": {"content": self.words}}],
        }
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_GET = do_POST = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_smoke_test_sends_a_key_and_fails_on_refusal_and_silence(
    renders: dict[str, Rendered],
    stub: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    port = stub.server_address[1]
    assert run_smoke(renders["keys"], port, tmp_path, "first,second").stdout == "m: red\n"
    refused = run_smoke(renders["keys"], port, tmp_path, "wrong")
    assert refused.returncode == 1
    assert "answered 401" in refused.stderr
    monkeypatch.setattr(Stub, "words", " ")
    silent = run_smoke(renders["keys"], port, tmp_path, "first")
    assert (silent.returncode, "empty" in silent.stderr) == (1, True)
