"""``python -m engine.node HOST``: what `internvl rank` runs on a host other than the leader's. HOST
is a ``Host`` as JSON.

It dials the leader until there is one, and has a process (``engine.rank``) do what it says. When
that has ended, as it does with every engine of the leader, it dials again. So a group is whole
again by itself, whichever of its processes died, until this one is told to leave by SIGTERM or
SIGINT.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec

from engine.network import keep_alive
from wire import handshake, logs
from wire.handshake import Offer, read_secret

logger = logging.getLogger("engine.node")  # not "__main__"

# Seconds between attempts to reach the leader, and in which an answer must come.
_AGAIN = 0.5
_PATIENCE = 10.0
# A life of so many seconds is short: after the second one in a row there is a pause of one second,
# and of twice as many after each further one, up to the most.
_SHORT = 5.0
_LONGEST_PAUSE = 16.0


class Host(msgspec.Struct, frozen=True):
    """Host number ``node`` of a group, with so many ranks. ``model`` is its checkpoint folder, ""
    where that is the leader's."""

    leader: str
    port: int
    node: int
    processes: int
    model: str
    secret_file: str
    log_level: str
    log_format: str


class Node:
    """Keeps the ranks of a host going, each in a thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._secret = read_secret(host.secret_file)
        self._lock = threading.Lock()  # of the processes
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self._leaving = threading.Event()

    def start(self) -> None:
        """Return at once."""
        for index in range(self._host.processes):
            name = f"process {index}"
            threading.Thread(target=self._keep, args=(index,), name=name, daemon=True).start()

    def leave(self) -> None:
        """End them all."""
        with self._lock:
            self._leaving.set()
            for child in self.children.values():
                child.kill()
            for child in self.children.values():
                child.wait()

    def _keep(self, index: int) -> None:
        short = 0  # lives in a row
        while (sock := self._dial(index)) is not None:
            began = time.monotonic()
            with sock:
                logger.info("process %d is a part of the group", index)
                child = self._spawn(index, sock)
            if child is not None:
                logger.info("process %d has ended with %d", index, child.wait())
            short = short + 1 if time.monotonic() - began < _SHORT else 0
            if short > 1:
                self._leaving.wait(min(2.0 ** (short - 2), _LONGEST_PAUSE))

    def _spawn(self, index: int, sock: socket.socket) -> "subprocess.Popen[bytes] | None":
        """None when it cannot be, or nobody wants it any more."""
        host = self._host
        command = [
            *(sys.executable, "-P", "-m", "engine.rank"),
            *(str(sock.fileno()), str(os.getpid()), host.model),
        ]
        told = {logs.LEVEL_VARIABLE: host.log_level, logs.FORMAT_VARIABLE: host.log_format}
        with self._lock:
            if self._leaving.is_set():
                return None
            try:
                child = self.children[index] = subprocess.Popen(
                    command,
                    pass_fds=[sock.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **told},
                )
            except OSError as error:  # no memory, processes or files: there may be some later
                logger.error("process %d cannot be started: %s", index, error)
                return None
        return child

    def _dial(self, index: int) -> socket.socket | None:
        """A connection to the leader, when it and we trust each other; None when we leave."""
        told = ""
        while not self._leaving.is_set():
            sock = None
            try:
                sock = socket.create_connection((self._host.leader, self._host.port), _PATIENCE)
                self._greet(sock, index)
                sock.settimeout(None)
                return sock
            except (OSError, EOFError) as error:
                if sock is not None:
                    sock.close()
                why = str(error)
            if why != told:
                logger.info("process %d cannot join yet: %s", index, why)
                told = why
            self._leaving.wait(_AGAIN)
        return None

    def _greet(self, sock: socket.socket, index: int) -> None:
        keep_alive(sock)
        challenged = _read(sock, handshake.CHALLENGE)
        offer = Offer(self._host.node, index, self._host.processes, handshake.version())
        called = handshake.call(self._secret, offer, challenged)
        sock.sendall(called)
        try:
            answered = _read(sock, handshake.PROOF)
        except EOFError:
            raise EOFError("the leader does not know our secret, or has just ended") from None
        if not handshake.is_leader(self._secret, challenged, called, answered):
            raise EOFError("who answers there does not know our secret")


def _read(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = sock.recv(size - len(found))
        if not piece:
            raise EOFError("the leader has closed the connection")
        found += piece
    return found


def main() -> None:
    """Be a part of the group until told to leave."""
    host = msgspec.json.decode(sys.argv[1], type=Host)
    logs.setup(host.log_level, f"node{host.node}", host.log_format)
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # before there are threads, which inherit it
    node = Node(host)
    node.start()
    logger.info("leaving: %s", signal.Signals(signal.sigwait(ends)).name)
    node.leave()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
