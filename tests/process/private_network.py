"""A network of its own with everything in it that a fetch must never reach, and the real fetcher.

Run as root of new user, network and mount namespaces (``unshare -rnm``). It gives the loopback
device public and private addresses, with a web server on each; answers names from a server that
changes its mind; lets the fetcher and the pipeline try; and prints what came of it as JSON.
"""

import asyncio
import collections
import ctypes
import fcntl
import http.server
import io
import ipaddress
import itertools
import json
import os
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from preprocessing import MediaPart, MediaPipeline
from preprocessing.media import Kind
from preprocessing.sources import Fetcher
from wire.errors import MediaRefused
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

PUBLIC = ["93.184.216.34", "2606:2800:220:1::1"]
SILENT = "93.184.216.35"  # public, but nobody listens
PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "198.18.0.1",
    "::1",
    "fd00:ec2::254",
    "fc00::1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::1",
    "2606:2800:220:1:0:5efe:a9fe:a9fe",
    "3fff::1",
]
METADATA = "169.254.169.254"
TENTATIVE = 0x40  # an IPv6 address that nothing can be bound to yet

connections: collections.Counter[str] = collections.Counter()
questions: collections.Counter[str] = collections.Counter()


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def raise_loopback() -> None:
    """Give the loopback device all addresses, with the oldest interface there is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        up = struct.pack("16sh", b"lo", 0x1 | 0x8 | 0x40)  # up, loopback, running
        fcntl.ioctl(control, 0x8914, up)
        addresses = [*PUBLIC, SILENT, *PRIVATE]
        for index, address in enumerate(a for a in addresses if ":" not in a):
            for request, value in ((0x8916, address), (0x891C, "255.255.255.255")):
                if address == "127.0.0.1":
                    continue
                name = f"lo:{index}".encode()
                fields = (name, socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(control, request, struct.pack("16sHH4s8x", *fields))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        for address in (a for a in addresses if ":" in a and a != "::1"):
            packed = socket.inet_pton(socket.AF_INET6, address)
            fcntl.ioctl(control, 0x8916, struct.pack("16sIi", packed, 128, 1))
    while any(int(flags, 16) & TENTATIVE for *_, flags, _ in rows("/proc/net/if_inet6")):
        time.sleep(0.01)  # the kernel takes each into use in a thread of its own


def rows(path: str) -> list[list[str]]:
    return [line.split() for line in Path(path).read_text("ascii").splitlines()]


def mount_over(path: str, text: str, folder: Path) -> None:
    """Show this process another file in place of ``path``."""
    file = folder / path.replace("/", "-")
    file.write_text(text)
    libc = ctypes.CDLL(None, use_errno=True)
    if Path(path).exists() and libc.mount(bytes(file), path.encode(), None, 4096, None):
        raise OSError(ctypes.get_errno(), "mount")


# name -> what the n-th question gets: addresses, or another name
Answers = Callable[[int], list[str]]


def always(*values: str) -> Answers:
    return lambda _: list(values)


def first_then(first: str, then: str) -> Answers:
    return lambda count: [first if count == 1 else then]


NAMES: dict[str, Answers] = {
    "public.example": always(PUBLIC[0]),
    "public6.example": always(PUBLIC[1]),
    "both.example": always(*PUBLIC),
    "alias.example": always("public.example"),
    "rebinding.example": first_then(PUBLIC[0], METADATA),
    "rebinding-back.example": first_then(METADATA, PUBLIC[0]),
    "rebinding-silent.example": first_then(SILENT, METADATA),
    "mixed.example": always(PUBLIC[0], METADATA),
    "silent-and-private.example": always(SILENT, METADATA),
    "internal-alias.example": always("metadata.internal"),
    "metadata.internal": always(METADATA),
    "mapped.example": always("::ffff:169.254.169.254"),
    "unspecified.example": always("0.0.0.0"),
    "unspecified6.example": always("::"),
    **{f"x{index}.example": always(address) for index, address in enumerate(PRIVATE)},
    **{f"y{index}.example": always(PUBLIC[0], other) for index, other in enumerate(PRIVATE)},
    **{f"z{index}.example": always(PUBLIC[1], other) for index, other in enumerate(PRIVATE)},
}


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def records(name: str, kind: int) -> list[bytes]:
    """The answers to one question, all with no time to live."""
    question = f"{name} {'A' if kind == 1 else 'AAAA'}"
    questions[question] += 1
    found = []
    for value in NAMES[name](questions[question]):
        if value in NAMES:
            target = encoded(value)
            found += [encoded(name) + struct.pack("!HHIH", 5, 1, 0, len(target)) + target]
            found += records(value, kind)
        elif (ipaddress.ip_address(value).version == 4) == (kind == 1):
            packed = ipaddress.ip_address(value).packed
            found += [encoded(name) + struct.pack("!HHIH", kind, 1, 0, len(packed)) + packed]
    return found


def answer_names() -> None:
    """A name server for ever."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    while True:
        query, client = server.recvfrom(4096)
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode().lower())
            at += 1 + query[at]
        kind = int.from_bytes(query[at + 1 : at + 3], "big")
        name = ".".join(labels)
        found = records(name, kind) if name in NAMES else []
        flags = 0x8580 if name in NAMES else 0x8583
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(found), 0, 0)
        server.sendto(head + query[12 : at + 5] + b"".join(found), client)


def serve(address: str) -> None:
    """A web server that shows a picture, and sends whoever asks for /to/URL to that URL."""

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        daemon_threads = True

        def get_request(self) -> Any:
            connections[address] += 1
            return super().get_request()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", urllib.parse.unquote(self.path[4:]))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            sink = io.BytesIO()
            Image.new("RGB", (30, 20), "red").save(sink, "PNG")
            self.send_response(200)
            self.send_header("Content-Length", str(sink.tell()))
            self.end_headers()
            self.wfile.write(sink.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    server = Server((address, 80), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def urls() -> dict[str, list[str]]:
    """What is tried: URLs that must show a picture, and URLs that must be refused."""
    start = f"http://{PUBLIC[0]}/to/"
    private = [f"http://{in_url(address)}/" for address in PRIVATE]
    forms = ["http://0x7f.1/", "http://2852039166/", "http://0/", "http://[::]/",
             "http://[::ffff:169.254.169.254]/", "http://[::169.254.169.254]/",
             "http://[fd00:ec2::254%25lo]/", "http://localhost/"]  # fmt: skip
    bad_names = [
        "rebinding-back", "mixed", "silent-and-private", "internal-alias", "mapped",
        "unspecified", "unspecified6",
        *(f"{letter}{index}" for letter in "xyz" for index in range(len(PRIVATE))),
    ]  # fmt: skip
    named = [f"http://{name}.example/" for name in bad_names] + ["http://metadata.internal/"]
    refused = [*private, *forms, *named]
    refused += [start + urllib.parse.quote(url) for url in refused]
    refused += [start * 3 + private[6], start + "http://rebinding.example/to/" + private[6]]
    # The first question was answered with the public address: the second must not be trusted.
    refused += ["http://rebinding.example/to/http://rebinding.example/"]
    shown = [
        "http://public.example/", "http://alias.example/", "http://public6.example/",
        "http://both.example/", f"http://{in_url(PUBLIC[1])}/", f"http://{PUBLIC[0]}/",
        start + "http://public6.example/", "http://rebinding.example/to/http://public.example/",
    ]  # fmt: skip
    return {"shown": shown, "refused": refused}


async def outcome(work: Any) -> str:
    try:
        await work
    except MediaRefused as refused:
        return refused.code
    return "shown"


async def attempts() -> dict[str, Any]:
    fetcher = Fetcher(MediaSettings())
    report: dict[str, Any] = {}
    for what, tried in urls().items():
        report[what] = {}
        for url, kind in itertools.product(tried, get_args(Kind)):
            questions.clear()
            report[what][f"{kind} {url}"] = await outcome(fetcher.fetch(url, "part", kind))
    for name in ("rebinding.example", "rebinding-silent.example"):
        questions.clear()
        found = await outcome(fetcher.fetch(f"http://{name}/", "part"))
        report[name] = [found, questions[f"{name} A"]]
    await fetcher.close()

    pipeline = MediaPipeline(MediaSettings())
    await pipeline.start(VisionGeometry(tile_size=8, tokens_per_tile=1))
    start = "http://public.example/"
    for path in ("cat.png", f"to/http://{METADATA}/", "to/http://mixed.example/"):
        report.setdefault("pipeline", {})[path] = await outcome(
            pipeline.load(MediaPart(start + path, "part"))
        )
    await pipeline.close()

    report["connections"] = {address: connections[address] for address in (*PUBLIC, *PRIVATE)}
    # What is counted above can be counted: with the guard off each of them is reached.
    open_fetcher = Fetcher(MediaSettings(allow_private_media=True))
    for address in PRIVATE:
        before = connections[address]
        found = await outcome(open_fetcher.fetch(f"http://{in_url(address)}/", "part"))
        report.setdefault("unguarded", {})[address] = [found, connections[address] - before]
    await open_fetcher.close()
    return report


def main(folder: Path) -> None:
    try:
        raise_loopback()
        mount_over("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:2\n", folder)
        mount_over("/etc/nsswitch.conf", "hosts: files dns\n", folder)
        mount_over("/etc/hosts", "127.0.0.1 localhost\n", folder)
    except OSError as error:
        print(json.dumps({"impossible": os.strerror(error.errno or 0)}))  # noqa: T201
        return
    threading.Thread(target=answer_names, daemon=True).start()
    for address in (*PUBLIC, *PRIVATE):
        serve(address)
    print(json.dumps(asyncio.run(attempts())))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
