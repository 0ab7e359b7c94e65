"""Real web servers for the tests of the fetcher, and what most of them ask it."""

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.media import Kind, Source
from preprocessing.sources import Fetcher
from wire.errors import MediaRefused
from wire.settings import MediaSettings

PARAM = "messages[0].content[1].image_url"
BODY = bytes(range(256)) * 40
OPEN = {"allow_private_media": True}


class Site:
    """A web server on all loopback addresses, whose pages are functions of the handler."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Callable[[Any], None]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.stopping = threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((self.path, dict(self.headers)))
                site.pages.get(self.path, picture)(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients break off on purpose

        self._server = Server(("", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def url(self, path: str = "/cat.png", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(handler: Any, status: int = 200, body: bytes = BODY, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def picture(handler: Any) -> None:
    answer(handler)


def redirect(target: str, status: int = 302) -> Callable[[Any], None]:
    return lambda handler: answer(handler, status, b"", Location=target)


async def fetch(url: Source, kind: Kind = "image", **settings: Any) -> bytes:
    """Fetch with the defaults, but from any port, which the sites of these tests need."""
    fetcher = Fetcher(MediaSettings(**{"allowed_media_ports": ()} | settings))
    try:
        return await fetcher.fetch(url, PARAM, kind)
    finally:
        await fetcher.close()


async def refusal(url: Source, kind: Kind = "image", **settings: Any) -> MediaRefused:
    """The error, which gives nothing away."""
    with pytest.raises(MediaRefused) as refused:
        await fetch(url, kind, **settings)
    error = refused.value
    assert (error.status, error.param) == (400, PARAM)
    assert error.__cause__ is None
    for secret in ("127.0.0.1", "::1", "/etc", "Errno", "httpx", "httpcore", "Error", "cat.png"):
        assert secret not in error.message
    return error


needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs openssl to make a certificate"
)


def certified(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[ssl.SSLContext, list[str | None]]:
    """What a server of that name needs, which clients made from now on trust, and the names that
    it is asked for."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=test", "-addext",
         f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    asked: list[str | None] = []
    context.sni_callback = lambda _sock, name, _context: asked.append(name)
    return context, asked
