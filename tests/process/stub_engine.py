"""An engine process without a model: ``python -m tests.process.stub_engine [OPTION=VALUE ...] FD``.

Options: ``load=hang`` never gets ready, ``load=fail`` raises while loading, ``fail_at=N`` raises in
step N, ``load=fail_after:PATH`` fails to load from the second start on (PATH marks the first).
"""

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engine.process import serve
from tests.fake_runner import FakeRunner
from wire.messages import Progress
from wire.settings import EngineSettings

options = dict(argument.split("=", 1) for argument in sys.argv[1:-1])


def make_runner(settings: EngineSettings, progress: Callable[[Progress], None]) -> FakeRunner:
    progress(Progress("weights", 1, 2))
    load, _, path = options.get("load", "").partition(":")
    if load == "hang":
        threading.Event().wait()
    if load == "fail" or (load == "fail_after" and Path(path).exists()):
        raise ValueError("there are no weights here")
    if path:
        Path(path).touch()
    fail_at = int(options["fail_at"]) if "fail_at" in options else None
    return FakeRunner(settings, progress, blocks=4096, max_model_len=10_000, fail_at=fail_at)


sys.exit(serve(socket.socket(fileno=int(sys.argv[-1])), make_runner))
