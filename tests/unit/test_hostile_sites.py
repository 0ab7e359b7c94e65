"""What a hostile web server costs: no more than the caps and the deadline, and one refusal."""

import asyncio
import gzip
import itertools
import resource
import socket
import threading
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import httpcore
import pytest

from tests.sites import BODY, OPEN, Site, answer, fetch, refusal

MIB = 1 << 20
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def raw(*pieces: bytes) -> Callable[[Any], None]:
    """A page that is these bytes, whatever they mean."""
    return lambda handler: [handler.wfile.write(piece) for piece in pieces] and None


def endless(site: Site, head: bytes, pieces: Iterable[bytes], gone: threading.Event) -> Any:
    """A page that begins with ``head`` and goes on until the client has gone."""

    def page(handler: Any) -> None:
        try:
            handler.wfile.write(head)
            for piece in pieces:
                if site.stopping.is_set():
                    return
                handler.wfile.write(piece)
        except OSError:
            gone.set()

    return page


# compressed answers, although none was asked for


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "GZip", " gzip "])
async def test_a_compressed_body_is_unpacked(site: Site, coding: str) -> None:
    packed = zlib.compress(BODY) if coding == "deflate" else gzip.compress(BODY)
    site.pages["/packed"] = lambda handler: answer(handler, 200, packed, Content_Encoding=coding)
    assert await fetch(site.url("/packed"), **OPEN) == BODY
    assert site.requests[0][1]["Accept-Encoding"] == "identity"


async def test_a_long_compressed_body_is_unpacked(site: Site) -> None:
    body = BODY * 500  # several times what is unpacked at once
    packed = gzip.compress(body, 1)
    site.pages["/packed"] = lambda handler: answer(handler, 200, packed, Content_Encoding="gzip")
    assert await fetch(site.url("/packed"), **OPEN) == body


async def test_a_bomb_costs_no_more_than_the_cap(site: Site) -> None:
    packer = zlib.compressobj(9, wbits=31)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(400)) + packer.flush()
    site.pages["/bomb"] = lambda handler: answer(handler, 200, packed, Content_Encoding="gzip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = await refusal(site.url("/bomb"), **OPEN, max_media_bytes=4 * MIB)
    assert error.code == "media_too_large"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 << 10, "kilobytes; the bomb has 400 MiB"


async def test_compressed_bytes_that_unpack_to_nothing_are_counted(site: Site) -> None:
    """An empty stored block, for ever: it never gives a byte."""
    gone = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n\r\n\x78\x01"
    blocks = itertools.repeat(b"\0\0\0\xff\xff" * 10_000)
    site.pages["/nothing"] = endless(site, head, blocks, gone)
    error = await refusal(site.url("/nothing"), **OPEN, max_media_bytes=MIB)
    assert error.code == "media_too_large"
    assert await asyncio.to_thread(gone.wait, 60)


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("br", b"x"),
        ("zstd", b"x"),
        ("compress", b"x"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY))),
        ("gzip", gzip.compress(BODY)[:-9]),
        ("gzip", gzip.compress(BODY)[:-1] + b"x"),
        ("gzip", gzip.compress(BODY) + b"more"),
        ("gzip", gzip.compress(BODY) * 2),
        ("gzip", BODY),
        ("gzip", b""),
        ("deflate", zlib.compress(BODY)[2:-4]),
    ],
)
async def test_other_codings_and_broken_ones_are_refused(
    site: Site, coding: str, packed: bytes
) -> None:
    site.pages["/packed"] = lambda handler: answer(handler, 200, packed, Content_Encoding=coding)
    error = await refusal(site.url("/packed"), **OPEN)
    assert error.message == "The picture could not be fetched."


# what the body is


@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "application/x-sh", ""])
async def test_the_declared_type_decides_nothing(site: Site, kind: str) -> None:
    site.pages["/typed"] = lambda handler: answer(handler, Content_Type=kind)
    assert await fetch(site.url("/typed"), **OPEN) == BODY


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><title>x",
        b"<html>",
        b"\xef\xbb\xbf\r\n  <!doctype HTML public>",
        b"<HTML a>",
    ],
)
async def test_a_web_page_is_refused_by_its_content(site: Site, body: bytes) -> None:
    site.pages["/page"] = lambda handler: answer(handler, 200, body, Content_Type="image/png")
    error = await refusal(site.url("/page"), "video", **OPEN)
    assert (error.code, error.message) == (
        "unsupported_media",
        "The video's URL leads to a web page.",
    )


# protocol without content


ENDLESS = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: <" + b"x" * 9000 + b">\r\n\r\n"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "one header": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 65536),
    "no lines": (b"", b"\0" * 65536),
    "HTTP/0.9": (b"<html>", b"<p>hello" * 5000),
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n" * 5000),
    "extensions of chunks": (CHUNKED, b"1;" + b"e" * 60_000 + b"\r\nx\r\n"),
    "one extension": (CHUNKED + b"1;", b"e" * 65536),
    "the size of a chunk": (CHUNKED, b"0" * 65536),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n" * 1000),
    "a redirect's body": (b"HTTP/1.1 302 Found\r\nLocation: /endless\r\n\r\n", b"x" * 65536),
    "an error's body": (b"HTTP/1.1 404 No\r\n\r\n", b"x" * 65536),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_endless_protocol_is_broken_off_before_the_deadline(site: Site, what: str) -> None:
    gone = threading.Event()
    head, piece = ENDLESS[what]
    site.pages["/endless"] = endless(site, head, itertools.repeat(piece), gone)
    async with asyncio.timeout(120):
        error = await refusal(site.url("/endless"), **OPEN, fetch_timeout=600.0)
    assert error.message == "The picture could not be fetched."
    assert await asyncio.to_thread(gone.wait, 60)


async def test_a_handshake_that_never_ends_costs_no_more_than_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with asyncio.timeout(60):
            url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
            error = await refusal(url, **OPEN, fetch_timeout=0.2)
        assert error.code == "media_unreachable"
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(60)
            while connection.recv(65536):
                pass  # its side of the handshake, and then the end


async def test_a_body_in_ordinary_chunks_is_not_protocol(site: Site) -> None:
    body = BODY * 200  # 2 MB in chunks of 256 bytes: far more framing than an answer may begin with
    chunks = b"".join(b"100\r\n%b\r\n" % body[at : at + 256] for at in range(0, len(body), 256))
    site.pages["/chunks"] = raw(CHUNKED, chunks, b"0\r\n\r\n")
    assert await fetch(site.url("/chunks"), **OPEN) == body


async def test_an_interim_answer_or_two_are_skipped(site: Site) -> None:
    site.pages["/hints"] = lambda handler: (
        handler.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"),
        answer(handler),
    )
    assert await fetch(site.url("/hints"), **OPEN) == BODY


@pytest.mark.parametrize(
    ("page", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst, and more", b"first"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4, 4\r\n\r\nsame", b"same"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nother", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\nfirst", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nfirst", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", None),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\nhello", None),
        (b"HTTP/2 200 OK\r\n\r\n", None),
        (b"HTTP/1.1 999 OK\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\nx", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nx", None),
        (b"HTTP/1.1 302 \xff\r\nLocation: http://\xff\xfe/\r\n\r\n", None),
        (b"HTTP/1.1 302 x\r\nLocation: /a\r\nLocation: /b\r\n\r\n", None),
        (CHUNKED + b"-1\r\nx\r\n", None),
        (CHUNKED + b"ffffffffffffffffffff\r\nx\r\n", None),
        (CHUNKED + b"1\r\nxyz\r\n", None),
    ],
)
async def test_lies_about_lengths_are_taken_at_their_word_or_refused(
    site: Site, page: bytes, body: bytes | None
) -> None:
    site.pages["/lie"] = raw(page)
    if body is not None:
        assert await fetch(site.url("/lie"), **OPEN) == body
    else:
        code = (await refusal(site.url("/lie"), **OPEN)).code
        assert code in {"media_unreachable", "media_too_large", "invalid_media"}


# what is read at once


class Recorded(httpcore.AnyIOBackend):
    """The network, and how much was asked of its connections at a time."""

    asked: ClassVar[list[int]] = []

    async def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        stream = await super().connect_tcp(*arguments, **options)
        read = stream.read

        async def recorded(most: int, timeout: float | None = None) -> bytes:
            self.asked.append(most)
            return await read(most, timeout)

        stream.read = recorded  # type: ignore[method-assign]
        return stream


@pytest.mark.parametrize("coding", ["identity", "chunked"])
async def test_only_a_body_of_known_length_is_read_in_large_pieces(
    site: Site, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks cost the reader more than their bytes: other tasks get their turn between them."""
    body = BODY * 100
    length = b"Content-Length: %d\r\n" % len(body)
    head = b"HTTP/1.1 200 OK\r\n" + length
    if coding == "chunked":  # which the length does not change
        head += b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    site.pages["/long"] = raw(head + b"\r\n", body)
    monkeypatch.setattr(Recorded, "asked", [])
    monkeypatch.setattr(httpcore, "AnyIOBackend", Recorded)
    assert await fetch(site.url("/long"), **OPEN) == BODY * 100
    head_sizes, sizes = Recorded.asked[:1], set(Recorded.asked[1:])
    assert head_sizes == [16 << 10]
    assert sizes == {256 << 10 if coding == "identity" else 16 << 10}


async def test_what_comes_behind_the_announced_length_is_not_read(site: Site) -> None:
    gone = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    site.pages["/more"] = endless(site, head + BODY, itertools.repeat(b"x" * 65536), gone)
    assert await fetch(site.url("/more"), **OPEN) == BODY
    assert await asyncio.to_thread(gone.wait, 60)
