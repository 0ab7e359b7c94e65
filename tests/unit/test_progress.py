"""How loading is shown, on a terminal and elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

from tests.servers import ROOT

LOADING = """
import sys
from server.progress import Loading
from wire.messages import Progress
loading = Loading(brief=sys.argv[1] == "brief")
loading.show(None)
for stage, done, total in (("config", 0, 0), ("weights", 1, 4), ("weights", 3, 4), ("tune", 0, 0)):
    loading.show(Progress(stage, done << 30, total << 30))
loading.end()
"""


@pytest.mark.parametrize("kind", ["brief", "long"])
def test_a_terminal_has_a_bar_and_a_log_has_lines(kind: str) -> None:
    command = [sys.executable, "-c", LOADING, kind]
    lines = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True
    ).stderr.splitlines()
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    subprocess.run(command, cwd=ROOT, stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "weights" in shown
    assert "1.1/4.3 GB" in shown
    assert "3.2/4.3 GB" in shown
    if kind == "brief":
        assert lines == []
        assert "tune" not in shown
    else:
        assert [line.split()[0] for line in lines] == ["config", "weights:", "tune"]
        assert "4.29 GB in" in lines[1]
        assert "tune" in shown
