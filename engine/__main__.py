"""``python -m engine FD``: an engine process, for the front end to start; not for people.

FD is the inherited end of a socket pair. The process leaves when the other end closes.
"""

import os
import socket
import sys
from collections.abc import Callable

from engine.core import Runner
from engine.process import end_with_parent, serve
from engine.ranks import Ranks
from wire import logs
from wire.messages import Fault, Progress
from wire.settings import EngineSettings


def load(settings: EngineSettings, tell: Callable[[Progress | Fault], None]) -> Runner:
    """Import torch and load the model, when the socket is already being watched."""
    if settings.processes > 1:
        return Ranks(settings, tell)
    from engine.runner import ModelRunner

    return ModelRunner(settings, tell)


def main() -> None:
    """Serve the socket named on the command line."""
    level, form = os.environ.get(logs.LEVEL_VARIABLE), os.environ.get(logs.FORMAT_VARIABLE)
    name = os.environ.get(logs.NAME_VARIABLE)
    logs.setup(level or "info", name or "engine", form or "text")
    end_with_parent(os.getppid())
    status = serve(socket.socket(fileno=int(sys.argv[1])), load)
    # Nothing is left to save, and tearing down a device context can take seconds.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
