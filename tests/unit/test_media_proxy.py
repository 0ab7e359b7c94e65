"""With a media proxy everything goes through it, and only what may; without one nothing does."""

import asyncio
import base64
import contextlib
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preprocessing import sources
from preprocessing.sources import Fetcher
from tests.sites import BODY, Site, answer, certified, fetch, needs_openssl, redirect, refusal
from wire.settings import MediaSettings, SettingError

VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]


class Proxy:
    """A forward proxy that leads every host to one port of this machine."""

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.reply: int | None = None  # a status to refuse everything with
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not proxy.admits(self):
                    return
                path = httpx.URL(self.path).raw_path.decode()
                headers = {name: self.headers[name] for name in ("Host", "Accept")}
                url = f"http://127.0.0.1:{target}{path}"
                reply = httpx.get(url, headers=headers, trust_env=False, timeout=60)
                wanted = ("Location",) if "Location" in reply.headers else ()
                kept = {name: reply.headers[name] for name in wanted}
                answer(self, reply.status_code, reply.content, **kept)

            def do_CONNECT(self) -> None:
                if not proxy.admits(self):
                    return
                self.send_response(200)
                self.end_headers()
                with socket.create_connection(("127.0.0.1", target)) as upstream:
                    back = threading.Thread(target=pump, args=(upstream, self.connection))
                    back.start()
                    pump(self.connection, upstream)
                    back.join()

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def admits(self, handler: Any) -> bool:
        self.asked.append((f"{handler.command} {handler.path}", dict(handler.headers)))
        if self.reply is not None:
            answer(handler, self.reply, b"no")
        return self.reply is None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(site: Site) -> Iterator[Proxy]:
    proxy = Proxy(site.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _no_names_are_resolved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1", "localhost", b"localhost"), host
        return real(host, *arguments, **options)

    monkeypatch.setattr(sources.socket, "getaddrinfo", getaddrinfo)


async def test_a_proxy_is_asked_for_the_name(site: Site, proxy: Proxy) -> None:
    url = "http://pictures.example:8080/cat.png?size=1#top"
    assert await fetch(url, media_proxy=proxy.url) == BODY
    (line, headers), *others = proxy.asked
    assert line == "GET http://pictures.example:8080/cat.png?size=1"
    assert headers["Host"] == "pictures.example:8080"
    assert "Proxy-Authorization" not in headers
    assert not others


async def test_a_password_is_for_the_proxy_alone(site: Site, proxy: Proxy) -> None:
    url = proxy.url.replace("//", "//user:pass%40word@")
    assert await fetch("http://pictures.example/cat.png", media_proxy=url) == BODY
    basic = "Basic " + base64.b64encode(b"user:pass@word").decode()
    assert proxy.asked[0][1]["Proxy-Authorization"] == basic
    assert "user" not in str(site.requests)


@needs_openssl
async def test_tls_is_made_with_the_host_behind_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, asked = certified(tmp_path, "pictures.example", monkeypatch)
    with contextlib.ExitStack() as stack:
        secure = Site(context)
        stack.callback(secure.close)
        proxy = Proxy(secure.port)
        stack.callback(proxy.close)
        assert await fetch("https://pictures.example/cat.png", media_proxy=proxy.url) == BODY
        assert proxy.asked[0][0] == "CONNECT pictures.example:443"
        assert asked == ["pictures.example"]
        assert secure.requests[0][1]["Host"] == "pictures.example"
        error = await refusal("https://other.example/cat.png", media_proxy=proxy.url)
        assert error.code == "media_unreachable"
        assert len(secure.requests) == 1


@needs_openssl
async def test_a_proxy_can_be_spoken_to_in_tls(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, _ = certified(tmp_path, "localhost", monkeypatch)
    proxy = Proxy(site.port, context)
    try:
        url = f"https://localhost:{proxy.port}"
        assert await fetch("http://pictures.example/cat.png", media_proxy=url) == BODY
        url = f"https://127.0.0.1:{proxy.port}"  # a name its certificate does not have
        error = await refusal("http://pictures.example/cat.png", media_proxy=url)
        assert error.code == "media_unreachable"
        assert len(proxy.asked) == 1
    finally:
        proxy.close()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "169.254.169.254", "10.0.0.1", "127.1", "2130706433", "0x7f.1",
     "localhost", "LOCALHOST.", "metadata.google.internal", "metadata", "printer.local",
     "127.0.0.1.", "127。0。0。1", "[::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_is_not_asked_for_what_is_plainly_private(
    proxy: Proxy, scheme: str, host: str
) -> None:
    error = await refusal(f"{scheme}://{host}/cat.png", media_proxy=proxy.url)
    assert error.code == "media_forbidden"
    assert not proxy.asked


async def test_a_redirect_through_a_proxy_passes_the_same_gate(site: Site, proxy: Proxy) -> None:
    site.pages["/there"] = redirect("http://other.example/cat.png")
    site.pages["/away"] = redirect("http://169.254.169.254/secret")
    site.pages["/loop"] = redirect("/loop")
    ask = "http://pictures.example"
    assert await fetch(f"{ask}/there", media_proxy=proxy.url) == BODY
    assert (await refusal(f"{ask}/away", media_proxy=proxy.url)).code == "media_forbidden"
    assert (await refusal(f"{ask}/loop", media_proxy=proxy.url)).code == "media_unreachable"
    assert not any("169.254" in line for line, _ in proxy.asked)


async def test_the_other_rules_hold_with_a_proxy_too(proxy: Proxy) -> None:
    rules = {"allowed_media_domains": ("pictures.example",), "allowed_media_ports": ("80",)}
    for url in (
        "http://other.example/",
        "http://pictures.example:81/",
        "https://pictures.example/",
    ):
        error = await refusal(url, **rules, media_proxy=proxy.url)
        assert error.code == "media_forbidden"
    error = await refusal("http://pictures.example/", media_proxy=proxy.url, max_media_bytes=1)
    assert error.code == "media_too_large"
    private = {"allow_private_media": True, "media_proxy": proxy.url}
    assert await fetch("http://pictures.internal/cat.png", **private) == BODY


@pytest.mark.parametrize("status", [301, 403, 407, 502])
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_refuses_is_one_refusal(proxy: Proxy, scheme: str, status: int) -> None:
    proxy.reply = status
    error = await refusal(f"{scheme}://pictures.example/", media_proxy=proxy.url)
    assert error.message == "The picture could not be fetched."


async def test_a_proxy_that_is_not_there_or_hangs_is_one_refusal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with asyncio.timeout(60):
            for scheme in ("http", "https"):
                error = await refusal(f"{scheme}://x.example/", media_proxy=url, fetch_timeout=0.2)
                assert error.code == "media_unreachable"
    assert (await refusal("http://x.example/", media_proxy=url)).code == "media_unreachable"


async def test_proxies_of_the_environment_are_not_used(
    site: Site, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in VARIABLES:
        monkeypatch.setenv(name, proxy.url)
    assert await fetch(site.url(), allow_private_media=True) == BODY
    await refusal(site.url().replace("http:", "https:"), allow_private_media=True)
    assert not proxy.asked


async def test_the_environment_cannot_exempt_a_host_from_the_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    assert await fetch("http://pictures.example/", media_proxy=proxy.url) == BODY
    assert len(proxy.asked) == 1


@pytest.mark.parametrize(
    "text",
    ["socks5://127.0.0.1:1080", "127.0.0.1:3128", "proxy", "http://", "ftp://user:hidden@proxy",
     "http://user:hidden@[::1", "http://proxy:port"],
)  # fmt: skip
def test_a_proxy_that_is_none_is_fatal_and_its_password_is_not_shown(text: str) -> None:
    with pytest.raises(SettingError) as error:
        Fetcher(MediaSettings(media_proxy=text))
    assert "media_proxy" in str(error.value)
    assert "hidden" not in str(error.value)
