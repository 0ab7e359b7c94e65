"""Who answers clients comes to its turn sooner than who computes."""

import subprocess
import sys

import pytest

# In a process of its own: a thread keeps what it has asked for.
ASK = """
import ctypes, platform, subprocess, sys
from server import turns
asked = turns.take_short_turns()
def length(pid):
    found = turns._Attributes()
    call = turns._CALLS[platform.machine()][0]
    ctypes.CDLL(None).syscall(call, pid, ctypes.byref(found), ctypes.sizeof(found), 0)
    return found.runtime
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(asked, length(0), length(child.pid))
child.communicate(b"x")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_thread_has_short_turns_and_its_children_do_not() -> None:
    found = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    asked, own, childs = found.stdout.split()
    if asked == "False" or own == "0":
        pytest.skip("this kernel, machine or sandbox knows no turns of a thread's own")
    assert int(own) == 100_000 < int(childs)


NICE = """
import ctypes, os, subprocess, sys
from server import turns
try:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
except PermissionError:
    sys.exit(9)
turns.take_short_turns()
print(subprocess.check_output([sys.executable, "-c", "import os; print(os.nice(0))"], text=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_server_that_comes_before_others_keeps_its_place_for_all_it_starts() -> None:
    command = [sys.executable, "-c", NICE]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 9:
        pytest.skip("only root may be less nice")
    assert found.stdout.split() == ["-5"]


def test_where_linux_is_not_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from server import turns

    monkeypatch.setattr(turns, "_CALLS", {})
    assert turns.take_short_turns() is False
