"""What processes of several hosts need of the network between them."""

import contextlib
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"

_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>
_INET6 = Path("/proc/net/if_inet6")
# A host that lost its power closes nothing. It is asked after so many seconds of silence, again so
# often, and is gone when it has not answered twice or taken what was sent for so many milliseconds.
_KEEP_ALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": 20_000,
}


def keep_alive(sock: socket.socket) -> None:
    """Send at once over a TCP connection, and notice when the other host has gone silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if option := getattr(socket, name, None):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that takes connections; port 0 is one that is free. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=backlog)


def local_address(sock: socket.socket) -> str:
    """The address by which the peer of a TCP connection knows this host."""
    return str(sock.getsockname()[0])


def use_interface(address: str) -> None:
    """Let gloo and NCCL talk on the interface with this address, unless the operator has said on
    which: of themselves they listen where the host's name leads."""
    name = _interface(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _interface(address: str) -> str | None:
    """The name of the interface that has an address; None where the system does not say."""
    if sys.platform != "linux":
        return None
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        rows = [row.split() for row in _INET6.read_text("ascii").splitlines()]
        return next((row[-1] for row in rows if row[0] == wanted), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no such address
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
