"""Runs the application in a uvicorn server: console, signals, drain, exit status. The port opens
before the model is loaded, so that probes are answered from the first second."""

import asyncio
import collections
import contextlib
import functools
import ipaddress
import logging
import resource
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.admin import Admin
from server.announce import announce
from server.errors import access, envelope
from server.keys import Keys
from server.lifecycle import Service
from server.reload import Reloader
from server.tls import Certificate
from server.turns import take_short_turns
from wire.errors import InvalidRequest
from wire.heap import return_what_is_freed
from wire.logs import about, say
from wire.settings import ServerSettings, SettingError, Settings

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
# What glibc starts with; a tile of a picture has more, and bodies that hold pictures.
LARGE = 128 << 10
# Bytes of a request's head, and of what else is no body: chunks' headers, and trailers.
HEAD_LIMIT = 64 << 10
# Bytes of an answer that wait in this process for their client, and in the kernel before they are
# sent at all. What is not written yet can still be joined into fewer and larger pieces.
UNSENT = 16 << 10
CONNECTIONS = 1 << 16
# After the drain's own deadline; what still runs then is cancelled.
SHUTDOWN_TIMEOUT = 2
# Of seconds between requests. Longer than clients and proxies go on using a connection (5 of httpx,
# 60 of nginx and of load balancers): what they send while it is closed here is lost.
IDLE_TIMEOUT = 75


def serve(app: FastAPI, settings: Settings, door: socket.socket | None = None) -> int:
    """Serve until a signal or a failure; the exit status. ``door`` listens already, for whoever
    has started this process and tells the operator how it goes. Raises SettingError."""
    take_short_turns()
    certificate = Certificate.of(settings.server)
    config = _config(app, settings.server, certificate)
    operators = None
    if settings.server.admin_port:
        operators = _Operators(app.state.service, settings.server, certificate)
    return_what_is_freed(LARGE, arenas=1)
    _allow_connections()
    if settings.server.log_level != "debug":
        # What it says about a start that goes well, ``announce`` says for this server.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server = _Server(config, app.state.service, certificate, operators)
    try:
        server.run(None if door is None else [door])
    except SystemExit as error:  # uvicorn's way to say that the port is taken
        if error.code:
            say("nobody was served: another --port or --host?")
        return EXIT_FAILED if error.code else 0
    return EXIT_FAILED if server.service.failed.is_set() else 0


def _config(
    app: ASGIApp, settings: ServerSettings, certificate: Certificate | None, **options: Any
) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who they say has asked
        http=functools.partial(BoundedHttp, head_timeout=settings.head_timeout),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        timeout_keep_alive=IDLE_TIMEOUT,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        **options,
    )
    if certificate is not None:
        config.load()
        config.ssl = certificate.context
    return config


def _allow_connections() -> None:
    """Each needs a file descriptor, and 1,024 are a usual limit that every process may lift."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection whose request brings neither the end of its head nor of its body, but more
    and more bytes: the parser would keep them all. One whose head does not arrive within
    ``head_timeout`` seconds is ended too.

    A wish to go on in another protocol, which some clients add to every request, is passed over:
    the parser alone would take the body of such a request for the next one.
    """

    _useless = 0  # bytes since the last useful ones, up to the size of one read
    _part: bytes | memoryview = b""  # what the parser is given now
    _running: RequestResponseCycle | None = None  # what is being answered; ``cycle`` came last
    _head_due: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, head_timeout: float = 30.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timeout = head_timeout

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNSENT)
        sock = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_NOTSENT_LOWAT") and sock.family != socket.AF_UNIX:  # Linux, macOS
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._head_arrived()
        # Requests that came before the last one have lost their client too.
        for cycle in (self._running, *(queued for queued, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _await_head(self) -> None:
        """Until a head is complete, however many bytes of it come."""
        if self._head_due is None:
            self._head_due = self.loop.call_later(self._head_timeout, self.transport.close)

    def _head_arrived(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._useless += len(data)
        if self._running is None or self._running.response_complete:
            self._await_head()
        self._parts = collections.deque[bytes | memoryview]([memoryview(data)])
        while self._parts and not self.transport.is_closing():
            self._part = self._parts.popleft()
            super().data_received(self._part)  # type: ignore[arg-type]
        self._part = b""
        if self._useless > HEAD_LIMIT and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, and end the connection; without a word where an answer is under
        way, of which it would become a part, or due before."""
        due = self._running
        if due is not None and not due.response_complete:
            is_its_body = due is self.cycle and due.more_body and not due.response_started
            if not is_its_body:
                self.transport.abort()
                return
        body = envelope(InvalidRequest(msg, code="invalid_http"))
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nx-request-id: %b\r\nconnection: close\r\n\r\n"
        )
        identity = uuid.uuid4().hex
        with about(identity):
            access.info("no HTTP status=400: %s", msg)
        self.transport.write(head % (len(body), identity.encode()) + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Called when the parser has stopped behind a head that asks for another protocol."""
        stopped = sys.exception()
        if not isinstance(stopped, httptools.HttpParserUpgrade):
            raise TypeError("called without an upgrade")
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This server is no proxy.")
            return
        version = self.parser.get_http_version().encode()
        head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
        head += [b"%b: %b\r\n" % item for item in self.headers if item[0] != b"upgrade"]
        self._parts.extendleft([self._part[stopped.args[0] :], b"".join(head) + b"\r\n"])
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if self.parser.should_upgrade():
            return
        hosts = [value for name, value in self.headers if name == b"host"]
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        # A proxy may take the other host, or undo a coding that we would take for the body.
        if len(hosts) > 1 or any(value.lower() != b"chunked" for value in codings):
            raise ValueError("no request that everybody reads the same way")
        self._head_arrived()
        super().on_headers_complete()
        self.headers = []  # trailers, which the parser takes for headers, are none of the request's
        if len(self.pipeline) == 1:
            # One request ahead of its turn is no reason to be deaf for the end of the connection.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._useless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self.parser.should_upgrade():
            self._useless = 0
            super().on_message_complete()


class _Operators:
    """The port of operators, open as long as the other one is. It has the certificate too, but on
    the loopback interface, where nobody else listens, and a name would not fit."""

    def __init__(
        self, service: Service, settings: ServerSettings, certificate: Certificate | None
    ) -> None:
        """Takes the port. Raises SettingError."""
        self.keys = Keys.of_operators(settings)
        host = settings.admin_host
        try:
            family, *_, address = socket.getaddrinfo(
                host, settings.admin_port, type=socket.SOCK_STREAM
            )[0]
            self._door = socket.create_server(address[:2], family=family)
        except OSError as error:
            raise SettingError(f"admin_port: {error.strerror}") from None
        if ipaddress.ip_address(address[0]).is_loopback:
            certificate = None
        elif certificate is None:
            logger.warning("operators' keys cross the network in the clear: admin_host without TLS")
        app = Admin(service, self.keys).app
        self._server = uvicorn.Server(_config(app, settings, certificate, lifespan="off"))
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Serve, in a task."""
        self._task = asyncio.create_task(self._server._serve([self._door]))

    async def stop(self) -> None:
        """Close the port."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._door.close()


class _Server(uvicorn.Server):
    """A first signal drains, a second one ends at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        certificate: Certificate | None,
        operators: _Operators | None,
    ) -> None:
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals = 0
        self._operators = operators
        self._reloaders: list[Reloader] = []
        keys = service.keys
        if keys.file is not None:
            self._reloaders.append(Reloader("the file of keys", [keys.file], keys.load))
        if operators is not None and operators.keys.file is not None:
            keys = operators.keys
            self._reloaders.append(Reloader("operators' keys", [operators.keys.file], keys.load))
        if certificate is not None:
            files = certificate.files
            self._reloaders.append(Reloader("the TLS certificate", files, certificate.load))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            self._bound_unread_data()
            if sockets is None:
                port = self.servers[0].sockets[0].getsockname()[1]
                scheme = "https" if self.config.ssl else "http"
                self._spawn(announce(self.service, self.config.host, port, scheme))
            self._spawn(self._end_on_failure())
            self._reload_on_change()
            if self._operators is not None:
                self._operators.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._operators is not None:
            await self._operators.stop()
        await super().shutdown(sockets)

    def _reload_on_change(self) -> None:
        for reloader in self._reloaders:
            self._spawn(reloader.watch())
        if self._reloaders and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        for reloader in self._reloaders:
            reloader.reload()

    def _bound_unread_data(self) -> None:
        """Have the kernel end connections, which inherit this, whose client reads nothing.

        Admission ends their requests; what was written already would keep them open for ever.
        """
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            milliseconds = int(self.service.settings.server.send_timeout * 1000)
            for listening in self.servers[0].sockets:
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _end_on_failure(self) -> None:
        await self.service.failed.wait()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter between any two instructions of the main thread."""
        self._signals += 1
        if self._signals == 1 and self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)
        else:
            self.should_exit = True
            self.force_exit = self._signals > 2

    def _begin_drain(self, name: str) -> None:
        if not self.service.gate.idle.is_set():
            say(f"{name}: finishing what is running; send it again to stop at once")
        self._spawn(self._drain())

    async def _drain(self) -> None:
        await self.service.drain()
        self.should_exit = True
