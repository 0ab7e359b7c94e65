"""An HTTP server that answers as a test says, for the commands that ask one."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and a body: bytes as they are, an iterator of them as it goes, else as JSON."""


class Api:
    """``answer`` gets path and body of each POST, in threads; ``asked`` are these bodies. GET is
    answered by ``pages``: /ready, and /v1/models with one called "tiny"."""

    def __init__(self, answer: Callable[[str, Any], Answer]) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.pages: dict[str, Answer] = {
            "/ready": (200, {}, {"status": "ready"}),
            "/v1/models": (200, {}, {"data": [{"id": "tiny"}]}),
        }
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                handler.reply(self.pages.get(handler.path, (404, {}, {})))

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                with lock:
                    self.asked.append(body)
                    self.headers.append({k.lower(): v for k, v in handler.headers.items()})
                handler.reply(answer(handler.path, body))

            def reply(handler, given: Answer) -> None:
                status, headers, body = given
                try:
                    if isinstance(body, Iterator):
                        handler.send_response(status)
                        handler.send_header("connection", "close")
                        handler.end_headers()
                        for part in body:
                            handler.wfile.write(part)
                        handler.close_connection = True
                        return
                    data = body if isinstance(body, bytes) else json.dumps(body).encode()
                    handler.send_response(status)
                    for name, value in {"content-length": str(len(data)), **headers}.items():
                        handler.send_header(name, value)
                    handler.end_headers()
                    handler.wfile.write(data)
                except OSError:  # whoever asked has gone
                    handler.close_connection = True

            def log_message(handler, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
