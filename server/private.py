"""A server for one command alone: a child process on a loopback port, behind a key that nobody else
knows. It ends with its parent, whatever that dies of."""

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec

from engine.client import environment
from server.flags import DOOR
from server.target import Target
from wire import logs
from wire.settings import ServerSettings, SettingError, Settings

_STOP_TIMEOUT = 15.0


@contextlib.contextmanager
def private_server(settings: Settings) -> Iterator[Target]:
    """Start it; it ends with the block."""
    key = secrets.token_urlsafe(32)
    usual = ServerSettings(api_key=(key,))
    changes = {name: getattr(usual, name) for name in DOOR}
    settings = dataclasses.replace(settings, server=dataclasses.replace(settings.server, **changes))
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.private", str(door.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment(),
            pass_fds=(door.fileno(),),
            start_new_session=True,  # Ctrl-C is for the command
        )
    assert process.stdin is not None  # noqa: S101
    with process.stdin as pipe:
        pipe.write(msgspec.json.encode(settings) + b"\n")
        pipe.flush()
        try:
            yield Target(url, key, process=process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, which the interpreter wants for itself at its end
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Serve the socket named on the command line."""
    door = socket.socket(fileno=int(sys.argv[1]))
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.setup(settings.server.log_level, "api", settings.server.log_format)
    from server.run import serve
    from server.start import application

    try:
        return serve(application(settings), settings, door)
    except SettingError as error:
        logs.say(f"internvl: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
