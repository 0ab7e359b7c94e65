"""An engine process without a model: ``python -m tests.process.stub_engine [OPTION=VALUE ...] FD``.

Options: ``load=hang`` never gets ready, ``load=fail`` raises while loading, and
``load=fail_after:PATH`` does from the second start on (PATH marks the first). ``step=HOW:N`` fails
in step N, ``seed=HOW:N`` in every step that computes a request with seed N; HOW is "raise", "kill"
or "hang", the last holding the interpreter's lock. ``inbox=N`` breaks the inbox at message N. With
``once=PATH`` only the first process fails, and later ones have a context of ``then=N`` tokens.
"""

import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.plan import StepPlan
from engine.process import serve
from tests.fake_runner import FakeRunner
from wire.channel import Channel
from wire.messages import Progress
from wire.settings import EngineSettings

options = dict(argument.split("=", 1) for argument in sys.argv[1:-1])
max_model_len = 10_000
if (mark := Path(options.pop("once", ""))).name:
    if mark.exists():
        max_model_len = int(options.get("then", max_model_len))
        options = {}
    mark.touch()


class Runner(FakeRunner):
    """Fails as the options say."""

    def begin(self, plan: StepPlan) -> None:
        how, _, number = options.get("step", "").partition(":")
        if how and plan.step == int(number):
            fail(how)
        how, _, number = options.get("seed", "").partition(":")
        rows = {new.id: new.sampling.seed for new in plan.new_rows}
        rows |= {name: row.seed for name, row in self.rows.items()}
        if how and any(rows[work.id] == int(number) for work in plan.work):
            fail(how)
        super().begin(plan)


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        ctypes.PyDLL(None).sleep(600)
    raise RuntimeError("told to fail")


receive = Channel.receive
received_before = itertools.count()


def broken_receive(channel: Channel) -> Any:
    """Raises what nobody expects; message 0 holds the settings."""
    received = receive(channel)
    if next(received_before) == int(options["inbox"]):
        raise RuntimeError("told to break")
    return received


def make_runner(settings: EngineSettings, progress: Callable[[Progress], None]) -> FakeRunner:
    progress(Progress("weights", 1, 2))
    load, _, path = options.get("load", "").partition(":")
    if load == "hang":
        threading.Event().wait()
    if load == "fail" or (load == "fail_after" and Path(path).exists()):
        raise ValueError("there are no weights here")
    if path:
        Path(path).touch()
    return Runner(settings, progress, blocks=4096, max_model_len=max_model_len)


if "inbox" in options:
    Channel.receive = broken_receive  # type: ignore[method-assign]
sys.exit(serve(socket.socket(fileno=int(sys.argv[-1])), make_runner))
