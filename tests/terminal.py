"""A command in a terminal of its own: what it shows, and keys for it."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.servers import ROOT

# Has the terminal for its own, so that Ctrl-C reaches it as it does a person's.
_RUN = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "server", *sys.argv[1:]])
"""
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """``python -m server`` with these words. ``shown`` is everything until now."""

    def __init__(self, words: Sequence[str], home: Path) -> None:
        self.shown = ""
        self._seen = 0
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "HOME": str(home)},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self, says: str) -> None:
        """Ctrl-C at the prompt, until this is said of it: one that comes between showing the prompt
        and waiting for keys is noticed by Python only at the next key."""
        for _ in range(30):
            self.type(CTRL_C)
            end = time.monotonic() + 3
            while time.monotonic() < end and self._read(0.1):
                if self.shown.find(says, self._seen) >= 0:
                    self.expect(says)
                    return
        raise AssertionError(f"{says!r} is not in {self.shown[self._seen :]!r}")

    def expect(self, text: str, deadline: float = 90) -> str:
        """What is shown since the last time, up to this."""
        end = time.monotonic() + deadline
        while (at := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"{text!r} is not in {self.shown[self._seen :]!r}"
            assert self._read(1.0), f"it ended without {text!r}: {self.shown[self._seen :]!r}"
        found, self._seen = self.shown[self._seen : at + len(text)], at + len(text)
        return found

    def wait(self, deadline: float = 60) -> int:
        """The exit status, when everything is shown."""
        end = time.monotonic() + deadline
        while self._read(1.0):
            assert time.monotonic() < end, f"it goes on: {self.shown[self._seen :]!r}"
        return self.process.wait(60)

    def leave(self) -> int:
        """As a person does at the prompt, and not before it is there: the status."""
        self.expect("> ")
        self.type(CTRL_D)
        return self.wait()

    def _read(self, seconds: float) -> bool:
        """Whether there is more to come."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # the other end is closed
                return False
            self.shown += part.decode(errors="replace")
        return self.process.poll() is None or bool(select.select([self._master], [], [], 0)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
