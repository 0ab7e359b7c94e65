"""Whatever a client writes as a URL and whatever a server answers: bytes within the caps, or one
refusal; and nothing but a public address is ever dialled."""

import asyncio
import gzip
import ipaddress
import itertools
import socket
import socketserver
import threading
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import httpcore
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from preprocessing import connections, sources
from preprocessing.addresses import is_public
from preprocessing.media import Kind
from preprocessing.sources import Fetcher
from wire.errors import MediaRefused
from wire.settings import MediaSettings

CODES = {"invalid_media", "media_forbidden", "media_unreachable", "media_too_large"}
MOST = 20_000  # bytes of a part
LIMITS: dict[str, Any] = {"allowed_media_ports": (), "max_media_bytes": MOST, "fetch_timeout": 60.0}
GUARDED = Fetcher(MediaSettings(**LIMITS))
OPEN = Fetcher(MediaSettings(**LIMITS, allow_private_media=True))

# URLs


def resolve(host: str, port: int, **options: Any) -> Any:
    """Numbers as the system reads them; a name as its first letter and its length say."""
    try:
        return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)
    except OSError:
        private = ["127.0.0.1", "169.254.169.254", "fd00:ec2::254", "::ffff:10.0.0.1"]
        found = ["93.184.216.34", "2606:2800::1"][: 1 + len(host) % 2]
        found += private[len(host) % 4 :][:1] if host[:1] < "m" else []
        return [(0, 0, 0, "", (address, port)) for address in found]


class Redirects:
    """In place of the network: every server redirects to the next of ``targets``, the last one
    hangs up. ``dialled`` are the addresses of the servers."""

    def __init__(self, targets: list[str]) -> None:
        self.dialled: list[str] = []
        self._targets = targets[::-1]

    async def connect_tcp(self, host: str, *_: object) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        if not self._targets:
            raise httpcore.ConnectError
        head = f"HTTP/1.1 302 Found\r\nLocation: {self._targets.pop()}\r\n\r\n"
        return httpcore.AsyncMockStream([head.encode("utf-8", "surrogatepass")])


def mostly(usual: str, *others: str) -> st.SearchStrategy[str]:
    """Few oddities at a time: a URL with many is refused for the first."""
    return st.sampled_from([usual] * 4 * len(others) + list(others))


NUMBERS = st.one_of(
    st.integers(0, 2**32).map(lambda n: f"{n}"),
    st.integers(0, 2**32).map(hex),
    st.integers(0, 2**32).map(lambda n: f"0{n:o}"),
    st.ip_addresses(v=4).map(str),
    st.lists(
        st.sampled_from(["127", "0x7f", "0177", "0", "1", "169", "254", "10"]), max_size=5
    ).map(".".join),
)
ODD_HOSTS = st.one_of(
    NUMBERS,
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
    st.ip_addresses(v=4).map(lambda address: f"[::ffff:{address}]"),
    st.ip_addresses(v=4).map(lambda address: f"[64:ff9b::{address}]"),
    st.ip_addresses(v=4).map(lambda address: f"[2606::5efe:{address}]"),
    st.sampled_from(["localhost", "cats.example", "catsen.example", "[::1%lo]"]),
    st.text(max_size=12),
)
HOSTS = st.sampled_from(
    ["zoo.example", "pictures.example", "WWW.example.", "93.184.216.34", "[2606:2800::1]",
     "1572395042", "0x5db8d822", "\u5bb6.example"]
)  # fmt: skip
RESTS = mostly("/", "", "/cat.png", "?x", "#x", "\\", "/..", "@127.0.0.1", "/\r\nHost: x")


def urls(hosts: st.SearchStrategy[str], rests: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(
        mostly("http", "https", "HTTP", "file", "ftp", "ws", "", "data", "http:http"),
        mostly("://", ":", ":/", ":///", "//", ":\\\\"),
        mostly("", "user@", "user:x@", "@", "%40"),
        hosts,
        mostly("", ":80", ":0", ":70000", ":-1", ":", ":x"),
        rests,
    ).map("".join)


URLS = st.one_of(
    urls(HOSTS, RESTS), urls(ODD_HOSTS, RESTS), urls(HOSTS, st.text(max_size=12)), st.text()
)


@settings(max_examples=1000, deadline=None)
@given(
    url=URLS, targets=st.lists(URLS, min_size=2, max_size=4), kind=st.sampled_from(get_args(Kind))
)
def test_no_url_leads_anywhere_but_to_public_addresses(
    url: str, targets: list[str], kind: Kind
) -> None:
    network = Redirects(targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "socket", SimpleNamespace(getaddrinfo=resolve, SOCK_STREAM=1))
        patch.setattr(connections.httpcore, "AnyIOBackend", lambda: network)
        with pytest.raises(MediaRefused) as refused:
            asyncio.run(GUARDED.fetch(url, "part", kind))
    assert (refused.value.param, refused.value.code in CODES) == ("part", True)
    assert refused.value.message.startswith(("The picture", "The video", "A data: URL"))
    assert all(is_public(ipaddress.ip_address(host)) for host in network.dialled)
    event(f"dialled {len(network.dialled)}")
    assert len(network.dialled) <= 2 * (sources.MAX_REDIRECTS + 1)


# answers


class Server(socketserver.ThreadingTCPServer):
    """Sends whatever ``pieces`` are, one send each, and hangs up."""

    daemon_threads = True
    pieces: ClassVar[list[bytes]] = []

    class RequestHandlerClass(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            for piece in self.server.pieces:
                self.request.sendall(piece)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server: Server, pieces: list[bytes]) -> bytes | MediaRefused:
    server.pieces = pieces
    try:
        return asyncio.run(OPEN.fetch(f"http://127.0.0.1:{server.server_address[1]}/", "part"))
    except MediaRefused as refused:
        return refused


def cut(body: bytes, borders: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(border % (len(body) + 1) for border in borders)})
    return [body[a:b] for a, b in itertools.pairwise(places)]


@settings(max_examples=150, deadline=None)
@given(
    body=st.binary(max_size=300).map(lambda body: body * 80),
    borders=st.lists(st.integers(0, 2**16), max_size=20),
    framing=st.sampled_from(["length", "chunks", "end"]),
    coding=st.sampled_from(["identity", "gzip", "deflate"]),
    extension=st.sampled_from([b"", b";x", b";x=y", b"   "]),
)
def test_a_proper_answer_gives_its_body_however_it_is_cut(
    server: Server, body: bytes, borders: list[int], framing: str, coding: str, extension: bytes
) -> None:
    pack = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding]
    packed = pack(body)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\n" % coding.encode()
    if framing == "length":
        pieces = [head + b"Content-Length: %d\r\n\r\n" % len(packed), *cut(packed, borders)]
    elif framing == "chunks":
        chunks = [b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in cut(packed, borders)]
        pieces = [head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]
    else:
        pieces = [head + b"Connection: close\r\n\r\n", *cut(packed, borders)]
    answer = get(server, pieces)
    if len(body) > MOST or len(packed) > MOST:
        assert isinstance(answer, MediaRefused)
        assert answer.code == "media_too_large"
    else:
        assert answer == body


NOISE = st.one_of(st.binary(max_size=60), st.sampled_from([b"\n", b"\0", b": ", b";" * 70000]))
STARTS = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n"] * 9
    + [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n",
       b"HTTP/1.1 302 Found\r\nLocation: /\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/0.9 200\r\n", b""]
)  # fmt: skip
HEADERS = st.sampled_from(
    [b"Content-Length: 5\r\n", b"Content-Length: 99999\r\n", b"Content-Length: -5\r\n",
     b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked, chunked\r\n",
     b"Content-Encoding: gzip\r\n", b"Content-Encoding: deflate\r\n", b"Content-Encoding: br\r\n",
     b"Location: file:///etc/passwd\r\n", b"Location: \xff\r\n", b" folded\r\n", b"X: \xff\r\n",
     b"X: " + b"x" * 99_000 + b"\r\n", b"Set-Cookie: a=b\r\n", b"Content-Type: image/png\r\n"]
)  # fmt: skip
BODIES = st.sampled_from(
    [b"5\r\nhello\r\n", b"0\r\n\r\n", b"fffffff\r\n", b"hello", b"x" * 30_000, b"<html>", b"",
     gzip.compress(b"hello"), gzip.compress(bytes(1 << 20)), zlib.compress(b"hello")[:9]]
)  # fmt: skip


def joined(*parts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[bytes]]:
    return st.tuples(*parts).map(lambda lists: [piece for pieces in lists for piece in pieces])


ANSWERS = st.one_of(
    joined(
        STARTS.map(lambda start: [start]),
        st.lists(HEADERS, max_size=3),
        st.just([b"\r\n"]),
        st.lists(st.one_of(BODIES, NOISE), max_size=4),
    ),
    st.lists(st.one_of(STARTS, HEADERS, BODIES, NOISE), max_size=8),
)


@settings(max_examples=400, deadline=None)
@given(ANSWERS)
def test_any_answer_is_bytes_within_the_cap_or_a_refusal(
    server: Server, pieces: list[bytes]
) -> None:
    answer = get(server, pieces)
    if isinstance(answer, MediaRefused):
        assert (answer.param, answer.code in {*CODES, "unsupported_media"}) == ("part", True)
    else:
        assert len(answer) <= MOST
    event(answer.code if isinstance(answer, MediaRefused) else "bytes")
