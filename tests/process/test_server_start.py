"""Starts that go wrong end with a status and a reason, not with a server that never gets ready."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests import small_tokenizer

ROOT = Path(__file__).parents[2]


def serve(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "server", *flags],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_a_port_that_is_taken_ends_the_server_with_a_reason(tmp_path: Path) -> None:
    folder = small_tokenizer.save(tmp_path / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = serve("--model", str(folder), "--port", str(taken.getsockname()[1]))
        _, said = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "address already in use" in said
    assert "another --port" in said
    assert "Traceback" not in said


def test_a_checkpoint_that_cannot_be_loaded_ends_the_server_with_a_reason(tmp_path: Path) -> None:
    folder = small_tokenizer.save(tmp_path / "tiny")  # its config.json is empty
    server = serve("--model", str(folder), "--port", "0")
    _, said = server.communicate(timeout=120)
    assert server.returncode == 1
    assert "listening on http://127.0.0.1:" in said
    assert "not supported" in said


def test_a_setting_that_does_not_fit_the_model_ends_the_server_with_a_reason() -> None:
    server = serve("--pipeline-parallel-size", "60", "--port", "0")
    _, said = server.communicate(timeout=120)
    assert server.returncode == 1
    assert "pipeline_parallel_size 60 is more than the model's" in said
    assert "Traceback" not in said


def test_a_signal_while_loading_ends_the_server_in_peace(tmp_path: Path) -> None:
    folder = small_tokenizer.save(tmp_path / "tiny")
    server = serve("--model", str(folder), "--port", "0")
    assert server.stderr is not None
    for line in server.stderr:
        if "listening on" in line:
            break
    server.send_signal(signal.SIGTERM)
    _, said = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "Traceback" not in said
