"""Two hosts with a wire between them: network namespaces joined by a pair of virtual devices.

``python -m tests.process.two_hosts MODEL FOLDER TOKENS`` as root of new user and network namespaces
(``unshare -rn``) is the first host; FOLDER has a file with the secret. It starts the second, which
runs `internvl rank`; generates so many tokens, several times, while processes of both are ended;
and prints what came of it as JSON.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.client import ProcessEngine
from engine.process import end_with_parent
from tests.process.test_engine_main import request
from wire.settings import EngineSettings

FIRST, SECOND = "10.77.0.1", "10.77.0.2"
PORT = 29500
# Of <linux/rtnetlink.h>, <linux/if_link.h> and <linux/veth.h>.
RTM_NEWLINK, FLAGS = 16, 0x1 | 0x4 | 0x200 | 0x400  # a request with an answer; create, and only so
IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_PID = 3, 18, 19
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def lay_wire(pid: int) -> None:
    """A device ``wire`` here, and its other end in the namespace of another process."""
    link = bytes(16)  # an interface of which nothing is said
    name = attribute(IFLA_IFNAME, b"wire\0")
    peer = link + name + attribute(IFLA_NET_NS_PID, struct.pack("I", pid))
    kind = attribute(IFLA_INFO_KIND, b"veth")
    info = kind + attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, peer))
    body = link + name + attribute(IFLA_LINKINFO, info)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), RTM_NEWLINK, FLAGS, 1, 0) + body)
        (error,) = struct.unpack("i", kernel.recv(4096)[16:20])
    if error:
        raise OSError(-error, os.strerror(-error))


def raise_device(name: str, address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for what, value in (SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0"):
            fields = (name.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, what, struct.pack("16sHH4s8x", *fields))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", name.encode(), 0x1 | 0x40))


def second(folder: Path) -> None:
    """The other host, until it becomes `internvl rank`."""
    end_with_parent(os.getppid())  # `internvl rank`, too
    sys.stdout.write("here\n")
    sys.stdout.flush()
    sys.stdin.readline()
    raise_device("lo", "127.0.0.1")
    raise_device("wire", SECOND)
    words = ["rank", "--leader", f"{FIRST}:{PORT}", "--node", "1", *parts(folder)]
    os.execv(sys.executable, [sys.executable, "-m", "server", *words])  # noqa: S606


def parts(folder: Path) -> list[str]:
    secret = ["--rank-secret-file", str(folder / "secret")]
    return ["--tensor-parallel-size", "2", "--nodes", "2", *secret]


def children(pid: int) -> list[int]:
    """Processes that any thread of another has started."""
    tasks = Path(f"/proc/{pid}/task")
    return [
        int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()
    ]


async def ask(client: ProcessEngine, name: str, count: int) -> list[int]:
    return [t async for output in client.submit(*request(name, count)) for t in output.token_ids]


async def together(model: Path, folder: Path, count: int, node: int) -> dict[str, Any]:
    """What an engine on both hosts generates."""
    client = ProcessEngine(
        EngineSettings(
            model=str(model),
            device="cpu",
            num_kv_blocks=64,
            tensor_parallel_size=2,
            nodes=2,
            rank_host=FIRST,
            rank_port=PORT,
            rank_secret_file=str(folder / "secret"),
        )
    )
    await client.start()
    await client.wait_ready()
    report: dict[str, Any] = {"both hosts": await ask(client, "both", count)}
    for what in "rank", "engine":
        stream = asyncio.create_task(ask(client, what, count))
        steps = client.stats.steps
        while client.stats.steps < steps + 5:
            await asyncio.sleep(0)
        (rank,) = children(node)
        os.kill(rank if what == "rank" else client.pid or 0, signal.SIGKILL)
        report[f"after the death of the {what}"] = await stream
    report["restarts"] = client.restarts
    await client.stop()
    return report


def main(model: Path, folder: Path, count: int) -> None:
    program = [sys.executable, "-m", "tests.process.two_hosts", str(folder)]
    node = subprocess.Popen(
        ["unshare", "--net", *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert node.stdin is not None
    assert node.stdout is not None
    assert node.stdout.readline() == "here\n"
    try:
        lay_wire(node.pid)
        raise_device("lo", "127.0.0.1")
        raise_device("wire", FIRST)
    except OSError as error:
        node.kill()
        print(json.dumps({"impossible": os.strerror(error.errno or 0)}))  # noqa: T201
        return
    node.stdin.write("go\n")
    node.stdin.flush()
    try:
        report = asyncio.run(together(model, folder, count, node.pid))
    finally:
        node.send_signal(signal.SIGTERM)
        status = node.wait(60)
    left = len(children(os.getpid()))
    print(json.dumps(report | {"processes left": left, "status": status}))  # noqa: T201


if __name__ == "__main__":
    if len(sys.argv) == 2:
        second(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
