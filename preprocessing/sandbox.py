"""What a decode worker gives up before it sees a byte from outside. Called once, by the worker.

The layers overlap on purpose, so that a kernel without one of them still has the others:

- identity: a worker started as root becomes nobody, in a network namespace of its own;
- landlock: no path can be opened, no TCP port bound or connected;
- limits: memory, no file may grow, no descriptor may be opened, no process, no core dump;
- seccomp: every system call outside ``_CALLS`` fails with EPERM, and no memory can become code.

Afterwards the process can read and write the descriptors it holds, compute, and exit. One that
asked for ``threads`` can start threads of its own too, which inherit all of this; only seccomp can
tell a thread from a process, so where it is missing there are none. Nothing bounds how many a
hijacked process starts but the limits it inherited: they share its memory and its processor time,
and end with it. All imports must be done before.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CLONE_NEWNET = 0x40000000
_NOBODY = 65534

# System calls by name: numbers on (x86_64, aarch64).
_CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "shutdown": (48, 210),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "prlimit64": (302, 261),
    "getrandom": (318, 278),
}
# What starting a thread takes besides: the C library falls back to clone, whose flags a filter can
# see, when clone3 does not exist. The flags are those of a thread and of nothing else.
_THREAD_CALLS = {"set_robust_list": (273, 99), "rseq": (334, 293)}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_THREAD_FLAGS = 0x3D0F00
# Argument (index, bits) that must be zero: PROT_EXEC of a mapping; a process other than our own.
_ZERO_BITS = {"mmap": (2, 4), "mprotect": (2, 4), "prlimit64": (0, 0xFFFFFFFF)}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
# Access rights by the version of landlock that introduced them: files, then network.
_LANDLOCK_FILES = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_LANDLOCK_NET = {4: 0b11}


def confine(memory: int, threads: bool = False) -> list[str]:
    """Enter the sandbox for good; returns the names of the layers this system lacks.

    ``memory`` is how many bytes may be mapped beyond what is mapped now. ``threads`` allows
    threads, unless "seccomp" is among the layers returned. Raises RuntimeError if there are other
    threads already, which would stay outside.
    """
    _offer_to_be_killed()
    memory += _mapped()
    if not sys.platform.startswith("linux"):
        limit(memory)
        deny_processes()
        return ["identity", "landlock", "seccomp"]
    with contextlib.suppress(FileNotFoundError):  # no /proc
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("a process with several threads cannot be confined")
    missing = []
    layers: list[tuple[str, Callable[[], None]]] = [
        ("identity", drop_identity),
        ("landlock", deny_paths),  # before the limits: it needs one descriptor
        ("limits", lambda: limit(memory)),
        ("seccomp", lambda: deny_calls(threads)),
    ]
    for name, enter in layers:
        try:
            enter()
        except OSError:
            missing.append(name)
    if not threads or "seccomp" in missing:
        deny_processes()
    return missing


def limit_processor(seconds: int) -> None:
    """Let this process use ``seconds`` more of processor time; SIGXCPU ends it after that."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + seconds + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def drop_identity() -> None:
    """Leave root and the network; die with the parent; gain no rights; stay out of debuggers."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may forbid namespaces
            _libc("unshare", _CLONE_NEWNET)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # After the change of user, which resets the first two of these.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def limit(memory: int) -> None:
    """Resource limits; ``memory`` is the whole address space in bytes."""
    _limit("RLIMIT_AS", memory)
    for name in ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NOFILE"):
        _limit(name, 0)


def deny_processes() -> None:
    """No process can be started any more, and on Linux no thread: the limit counts both."""
    _limit("RLIMIT_NPROC", 0)


def deny_paths() -> None:
    """Landlock with no rule at all. Raises OSError where the kernel has none."""
    version = _libc("syscall", _LANDLOCK_CREATE, None, 0, 1)
    rights = [
        sum(bits for since, bits in table.items() if since <= version)
        for table in (_LANDLOCK_FILES, _LANDLOCK_NET)
    ]
    attributes = struct.pack("<QQ", *rights)
    size = len(attributes) if rights[1] else 8  # older kernels know the first field only
    ruleset = _libc("syscall", _LANDLOCK_CREATE, attributes, size, 0)
    try:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _libc("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def deny_calls(threads: bool = False) -> None:
    """Install the system call filter. Raises OSError where there is none for this machine."""
    if platform.machine() not in _MACHINES or sys.byteorder != "little":
        raise OSError("no filter for this machine")
    program = _program(*_MACHINES[platform.machine()], threads)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, header)


def _program(column: int, architecture: int, threads: bool) -> bytes:
    """The filter in the kernel's BPF code: 8 bytes an instruction."""
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06  # ld abs, jeq, jset, ret
    allow, kill = 0x7FFF0000, 0x80000000
    deny, absent = 0x00050000 + errno.EPERM, 0x00050000 + errno.ENOSYS

    def op(code: int, value: int, then: int = 0, other: int = 0) -> bytes:
        return struct.pack("<HBBI", code, then, other, value)

    # struct seccomp_data: call number at 0, architecture at 4, arguments of 8 bytes from 16.
    steps = [op(load, 4), op(equal, architecture, 1), op(give, kill), op(load, 0)]
    calls = _CALLS
    if threads:
        calls = _CALLS | _THREAD_CALLS
        steps += [
            op(equal, _CLONE3[column], 0, 1),
            op(give, absent),
            op(equal, _CLONE[column], 0, 4),
            op(load, 16),
            op(equal, _THREAD_FLAGS, 0, 1),
            op(give, allow),
            op(give, deny),
        ]
    for name, numbers in calls.items():
        if name in _ZERO_BITS:
            argument, bits = _ZERO_BITS[name]
            steps += [
                op(equal, numbers[column], 0, 4),
                op(load, 16 + 8 * argument),
                op(any_bit, bits, 1),
                op(give, allow),
                op(give, deny),
            ]
        else:
            steps += [op(equal, numbers[column], 0, 1), op(give, allow)]
    return b"".join((*steps, op(give, deny)))


def _limit(name: str, value: int) -> None:
    """A limit that the system does not know is passed over."""
    number = getattr(resource, name, None)
    if number is not None:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(number, (value, value))


def _offer_to_be_killed() -> None:
    """Have the kernel end this process first when memory runs out: it is replaced in a moment."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def _mapped() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    _libc("prctl", option, ctypes.c_ulong(value), pointer, 0, 0)


_LIBRARY = ctypes.CDLL(None, use_errno=True)


def _libc(function: str, *arguments: object) -> int:
    """Call a function of the C library; raises OSError when it returns a negative number."""
    result = int(_LIBRARY[function](*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), function)
    return result
