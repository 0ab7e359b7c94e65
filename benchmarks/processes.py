"""Servers as processes: started, waited for; processor time and memory as /proc tells them."""

import contextlib
import os
import platform
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

import httpx

from server.bench.client import Case

START_DEADLINE = 1800.0
_TICKS = os.sysconf("SC_CLK_TCK")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class Sender(Protocol):
    """A client of one server."""

    def measure(self, case: Case, seed: int) -> dict[str, float | None]: ...


class Server:
    """A server at ``url``, which has no path.

    ``command`` is its command line, or the process id of one that runs already and will go on. What
    it writes goes to ``log``. ``client`` makes the client of its URL, if it needs one of its own.
    """

    def __init__(
        self,
        name: str,
        url: str,
        command: str,
        log: Path = Path(os.devnull),
        client: Callable[[str], Sender] | None = None,
    ) -> None:
        self.name, self.url, self.command, self.log = name, url, command, log
        self.client = client
        self.attached = command.isdigit()
        self.ready_s: float | None = None

    def __enter__(self) -> Self:
        """Return when it is ready. Raises RuntimeError if it ends before."""
        began = time.perf_counter()
        if self.attached:
            self.pid = int(self.command)
        else:
            with self.log.open("ab") as sink:
                self._process = subprocess.Popen(
                    shlex.split(self.command), stdout=sink, stderr=sink, start_new_session=True
                )
            self.pid = self._process.pid
        try:
            while not self._ready():
                ended = not self.attached and self._process.poll() is not None
                if ended or time.perf_counter() - began > START_DEADLINE:
                    raise RuntimeError(f"{self.name} did not get ready; see {self.log}")
                time.sleep(0.05)
        except BaseException:
            self.__exit__()
            raise
        if not self.attached:
            self.ready_s = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        if not self.attached:
            end(self._process)

    def _ready(self) -> bool:
        try:
            status = httpx.get(f"{self.url}/health", timeout=5).status_code
            if status == httpx.codes.NOT_FOUND:
                status = httpx.get(f"{self.url}/v1/models", timeout=5).status_code
        except httpx.TransportError:
            return False
        return status == httpx.codes.OK

    def command_line(self) -> str:
        """The words it was started with."""
        words = Path(f"/proc/{self.pid}/cmdline").read_text(encoding="utf-8").rstrip("\0")
        return shlex.join(words.split("\0"))

    def cpu_s(self) -> float:
        """See ``cpu_seconds``."""
        return cpu_seconds(self.pid)

    def rss_gib(self) -> float:
        """Resident memory of all its processes; what two of them share counts twice."""
        pages = 0
        for pid in _tree(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session: what outlives it may hold a GPU's memory."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def free_port() -> int:
    """One that nobody listens at on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def cpu_seconds(*pids: int) -> float:
    """Processor time of processes and their descendants, those included that have ended."""
    ticks = 0
    for member in {member for pid in pids for member in _tree(pid)}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ticks += sum(map(int, _stat(member)[11:15]))
    return ticks / _TICKS


def machine_seconds() -> float:
    """Processor time that all cores spent on anything, or that other machines took from them."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS


def machine() -> dict[str, object]:
    """What the processor is called and can do, its cores, the memory in GiB."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    facts = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line
    )
    flags = facts.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": facts.get("model name", platform.machine()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
    }


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found
