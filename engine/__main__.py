"""``python -m engine FD``: an engine process, for the front end to start; not for people.

FD is the inherited end of a socket pair. The process leaves when the other end closes.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

from engine.core import Runner
from engine.process import serve
from wire import logs
from wire.messages import Progress
from wire.settings import EngineSettings

_PR_SET_PDEATHSIG = 1


def load(settings: EngineSettings, progress: Callable[[Progress], None]) -> Runner:
    """Import torch and load the model, when the socket is already being watched."""
    from engine.runner import ModelRunner

    return ModelRunner(settings, progress)


def main() -> None:
    """Serve the socket named on the command line."""
    level, form = os.environ.get(logs.LEVEL_VARIABLE), os.environ.get(logs.FORMAT_VARIABLE)
    logs.setup(level or "info", "engine", form or "text")
    if sys.platform == "linux":
        # A second net under the socket's end of file, for a parent that is killed while this
        # process is stuck in a library call and its inbox thread cannot run.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = serve(socket.socket(fileno=int(sys.argv[1])), load)
    # Nothing is left to save, and tearing down a device context can take seconds.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
