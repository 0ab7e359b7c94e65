"""A collector of traces: it takes them by OTLP over HTTP, and keeps what it is sent."""

import dataclasses
import http.server
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

DEADLINE = 60.0


@dataclasses.dataclass
class Kept:
    """A span; ``parent`` is empty at the top, ``failed`` where its status is an error."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    begin: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    links: list[str]
    service: dict[str, Any]

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9


class Collector:
    """Listens from the beginning. While ``broken`` it refuses what comes."""

    def __init__(self) -> None:
        self.spans: list[Kept] = []
        self.headers: list[dict[str, str]] = []
        self.raw = b""  # all that came
        self.broken = False
        self.calls = 0
        self._come = threading.Condition()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector._take(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _take(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._come:
            self.calls += 1
            self.headers.append({name.lower(): text for name, text in handler.headers.items()})
            if self.broken or handler.path != "/v1/traces":
                handler.send_response(400 if self.broken else 404)
            else:
                self.raw += body
                self.spans += _spans(ExportTraceServiceRequest.FromString(body))
                handler.send_response(200)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            self._come.notify_all()

    def wait_for_calls(self, calls: int) -> None:
        """Until it was sent something so often, whatever it has answered."""
        with self._come:
            assert self._come.wait_for(lambda: self.calls >= calls, DEADLINE), self.calls

    def of(self, identity: str) -> "Tree":
        """The spans of the request of this X-Request-Id, when it has come."""

        def tops() -> list[Kept]:
            header = "http.response.header.x-request-id"
            return [span for span in self.spans if span.attributes.get(header) == [identity]]

        with self._come:
            assert self._come.wait_for(tops, DEADLINE), f"{identity} is not among {self.spans}"
            (top,) = tops()
            return Tree(top, [span for span in self.spans if span.trace == top.trace])

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Tree:
    """A span and all of its trace."""

    def __init__(self, top: Kept, spans: Sequence[Kept]) -> None:
        self.top = top
        self._spans = spans

    @property
    def shape(self) -> dict[str, Any]:
        """Names, each with those below it, in the order of the alphabet."""
        return self._below(self.top)

    def _below(self, above: Kept) -> dict[str, Any]:
        below = sorted((s for s in self._spans if s.parent == above.id), key=lambda s: s.name)
        return {above.name: [self._below(span) for span in below]}

    def all(self, name: str) -> list[Kept]:
        """Those of this name, the earliest first."""
        found = (span for span in self._spans if span.name == name)
        return sorted(found, key=lambda span: span.begin)

    def one(self, name: str) -> Kept:
        (found,) = self.all(name)
        return found


def _spans(request: ExportTraceServiceRequest) -> Iterator[Kept]:
    for resource in request.resource_spans:
        service = {pair.key: _value(pair.value) for pair in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _kept(span, service)


def _kept(span: Span, service: dict[str, Any]) -> Kept:
    return Kept(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        kind=span.kind,
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes={pair.key: _value(pair.value) for pair in span.attributes},
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        links=[link.span_id.hex() for link in span.links],
        service=service,
    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind) if kind else None
    return [_value(one) for one in found.values] if kind == "array_value" else found
