"""What a confined process cannot do any more, tried in children that confine themselves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

TRY = """
import ctypes, json, mmap, os, resource, socket, sys, threading
from preprocessing import sandbox

held, peer = socket.socketpair()
listener = socket.create_server(("127.0.0.1", 0))
client = socket.socket()
folder = os.open(".", os.O_RDONLY)

x86 = os.uname().machine == "x86_64"
args = ctypes.create_string_buffer(88)  # clone3: no flags at all, a process of its own
library = ctypes.CDLL(None, use_errno=True)

{enter}

def by_hand(*arguments):
    child = library.syscall(*arguments, *[0] * (6 - len(arguments)))
    if child == 0:
        library._exit(0)
    if child < 0:
        raise OSError(ctypes.get_errno(), "clone")

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "a call")

def in_thread(action):
    outcome = []
    def run():
        try:
            outcome.append(action())
        except OSError as error:
            outcome.append(error)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    except RuntimeError as error:
        raise MemoryError(str(error))
    thread.join()
    if isinstance(outcome[0], OSError):
        raise outcome[0]

def attempt(action):
    try:
        action()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return None

print(json.dumps({{name: attempt(action) for name, action in {{
    "read a file": lambda: os.open("/etc/hostname", os.O_RDONLY),
    "read a file in a held folder": lambda: os.open("Makefile", os.O_RDONLY, dir_fd=folder),
    "write a file": lambda: os.open("/dev/null", os.O_WRONLY),
    "list a folder": lambda: os.listdir("/"),
    "remove a file": lambda: os.unlink("/tmp/no such file"),
    "open a socket": lambda: socket.socket(),
    "open a unix socket": lambda: socket.socketpair(),
    "connect a socket held open": lambda: client.connect(listener.getsockname()),
    "listen": lambda: held.listen(),
    "pass a descriptor": lambda: socket.send_fds(held, [b"x"], [1]),
    "open a pipe": lambda: os.pipe(),
    "copy a descriptor": lambda: os.dup(1),
    "fork": lambda: os.fork() or os._exit(0),
    "fork by hand": lambda: by_hand(56 if x86 else 220, 17),
    "fork by clone3": lambda: by_hand(435, args, 88),
    "vfork by hand": lambda: by_hand(56 if x86 else 220, 0x4000 | 17),
    "fork into new namespaces": lambda: by_hand(56 if x86 else 220, 0x10000000 | 17),
    "start a thread elsewhere": lambda: by_hand(56 if x86 else 220, 0x3D0F00 | 0x10000000),
    "share no memory with a child": lambda: by_hand(56 if x86 else 220, 0x3D0F00 & ~0x100),
    "leave what is shared": lambda: checked(library.unshare(0x200)),
    "trace a process": lambda: checked(library.ptrace(2, os.getpid(), None, None)),
    "start a thread": lambda: in_thread(int),
    "read a file from a thread": lambda: in_thread(lambda: os.open("/etc/hostname", os.O_RDONLY)),
    "open a socket from a thread": lambda: in_thread(socket.socket),
    "fork from a thread": lambda: in_thread(lambda: os.fork() or os._exit(0)),
    "run a program": lambda: os.execv("/no such program", ["true"]),
    "run a program from a thread": lambda: in_thread(lambda: os.execv("/none", ["true"])),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "limit the parent": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    "become root": lambda: os.setuid(0),
    "map executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC | mmap.PROT_READ),
    "change folder": lambda: os.chdir("/"),
    "map more memory than allowed": lambda: mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE),
    "map some memory": lambda: mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE),
    "use a descriptor": lambda: held.send(b"x"),
    "allow itself more processor time": lambda: sandbox.limit_processor(5),
}}.items()}}))
"""


def outcomes(enter: str) -> dict[str, str | None]:
    """Action -> the error it ended with, or None; ``enter`` is run first."""
    done = subprocess.run(
        [sys.executable, "-c", TRY.format(enter=enter)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


ALLOWED = {"map some memory", "use a descriptor", "allow itself more processor time"}


def test_a_confined_process_can_compute_and_nothing_else() -> None:
    tried = outcomes("sandbox.confine(64 << 20)")
    assert {name for name, error in tried.items() if error is None} == ALLOWED


def test_the_call_filter_alone_denies_everything_but_memory() -> None:
    tried = outcomes("sandbox.deny_calls()")
    possible = {name for name, error in tried.items() if error is None}
    assert possible == ALLOWED | {"map more memory than allowed"}


def test_a_process_that_may_start_threads_can_do_no_more_in_them() -> None:
    tried = outcomes("sandbox.confine(256 << 20, threads=True)")
    possible = {name for name, error in tried.items() if error is None}
    assert possible == ALLOWED | {"start a thread"}


def test_the_call_filter_alone_tells_threads_from_processes() -> None:
    tried = outcomes("sandbox.deny_calls(threads=True)")
    possible = {name for name, error in tried.items() if error is None}
    assert possible == ALLOWED | {"start a thread", "map more memory than allowed"}
    # It is the filter that denies them, not the kernel for a mistake in the call.
    for name in ("run a program", "run a program from a thread", "trace a process",
                 "start a thread elsewhere", "share no memory with a child"):  # fmt: skip
        assert tried[name] == "PermissionError", name


def test_no_thread_starts_where_no_filter_tells_it_from_a_process() -> None:
    """What was asked for counts for nothing on a kernel without seccomp."""
    tried = outcomes(
        "def missing(_): raise OSError\n"
        "sandbox.deny_calls = missing\n"
        "assert 'seccomp' in sandbox.confine(256 << 20, threads=True)"
    )
    for name in ("start a thread", "fork", "fork by hand", "fork by clone3", "vfork by hand"):
        assert tried[name] is not None, name


def test_a_process_that_has_threads_already_is_not_confined() -> None:
    code = """
import threading
from preprocessing import sandbox
waiting = threading.Event()
threading.Thread(target=waiting.wait).start()
try:
    sandbox.confine(64 << 20, threads=True)
except RuntimeError as error:
    print(error)
waiting.set()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True
    )
    assert b"several threads" in done.stdout


def test_landlock_alone_denies_every_path() -> None:
    tried = outcomes(
        "try: sandbox.deny_paths()\n"
        "except OSError: print(json.dumps({'missing': 'landlock'})), sys.exit(0)"
    )
    if "missing" in tried:
        pytest.skip("this kernel has no landlock")
    for name in ("read a file", "write a file", "list a folder"):
        assert tried[name] == "PermissionError", name


def test_the_limits_alone_deny_descriptors_and_memory() -> None:
    tried = outcomes("sandbox.limit(sandbox._mapped() + (64 << 20))")
    for name in (
        "read a file",
        "write a file",
        "open a socket",
        "open a pipe",
        "copy a descriptor",
    ):
        assert tried[name] == "OSError", name
    assert tried["map more memory than allowed"] == "OSError"
    assert tried["map some memory"] is None


def test_nothing_is_denied_outside() -> None:
    """The attempts themselves work: what fails above fails because of the sandbox."""
    tried = outcomes("")
    for name in ("read a file", "write a file", "list a folder", "open a socket", "open a pipe",
                 "connect a socket held open", "pass a descriptor", "copy a descriptor", "fork",
                 "fork by hand", "fork by clone3", "vfork by hand", "leave what is shared",
                 "start a thread", "read a file from a thread", "open a socket from a thread",
                 "fork from a thread",
                 "signal the parent", "map executable memory", "change folder"):  # fmt: skip
        assert tried[name] is None, name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_root_becomes_nobody_for_good() -> None:
    code = """
import os
from preprocessing import sandbox
sandbox.drop_identity()
print(os.getresuid(), os.getresgid(), os.getgroups())
try: os.setuid(0)
except PermissionError: print("for good")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True
    )
    nobody = "(65534, 65534, 65534)"
    assert done.stdout.decode().splitlines() == [f"{nobody} {nobody} []", "for good"]


@pytest.mark.parametrize("runaway", ["spin()", "threading.Thread(target=spin).start()"])
def test_processor_time_ends_a_runaway(runaway: str) -> None:
    code = f"""
import threading
from preprocessing import sandbox
def spin():
    while True: pass
sandbox.confine(256 << 20, threads=True)
sandbox.limit_processor(0)
{runaway}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGXCPU


def test_a_worker_holds_no_memory_that_can_be_written_and_run() -> None:
    code = """
from preprocessing import worker
worker._warm_up()
with open("/proc/self/maps") as maps:
    assert not [line for line in maps if "wx" in line.split()[1]]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)


def test_a_worker_carries_no_network_library() -> None:
    code = """
import sys
import preprocessing.worker
found = {"httpx", "httpcore", "h11", "numpy", "torch", "decord"} & set(sys.modules)
sys.exit(", ".join(found) or 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)
