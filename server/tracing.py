"""Traces by OpenTelemetry: a span for each HTTP request, and below it what wire.spans is told.

Imported only where a setting names a collector. Spans wait for that one in a queue of bounded
length, and are sent by a thread: whatever the collector does, no request notices.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote, urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from wire import spans
from wire.logs import trace_id
from wire.settings import SettingError, TracingSettings
from wire.spans import Span, Values

logger = logging.getLogger(__name__)

NAME = "internvl-server"
# Seconds that the last spans get when the server ends.
FLUSH_TIMEOUT = 3.0
# Spans that wait for the collector, and how many of them it is sent at once.
QUEUE, BATCH = 4096, 512
# Characters of an attribute.
_LONGEST = 256
# They may hold keys.
_HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})


class _Kept:
    """A span of OpenTelemetry, as wire.spans has it."""

    def __init__(self, tracer: Tracer, span: OpenSpan) -> None:
        self._tracer = tracer
        self._span = span

    def child(self, name: str, start: float | None = None) -> Span:
        above = set_span_in_context(self._span, Context())
        return _Kept(self._tracer, self._tracer.start_span(name, above, start_time=_ns(start)))

    def set(self, values: Values) -> None:
        self._span.set_attributes({k: value for k, value in values.items() if value is not None})

    def link(self, other: Span) -> None:
        if isinstance(other, _Kept):
            self._span.add_link(other._span.get_span_context())

    def fail(self, error: BaseException) -> None:
        self._span.set_attribute("error.type", spans.kind_of(error))
        if spans.is_ours(error):
            self._span.set_status(StatusCode.ERROR)

    def end(self, end: float | None = None) -> None:
        self._span.end(_ns(end))


def _ns(moment: float | None) -> int | None:
    return None if moment is None else int(moment * 1e9)


class Tracing:
    """Begins traces, and sends them to the collector that ``settings`` name. Raises SettingError
    where that is no address, or a variable of OpenTelemetry's is wrong."""

    def __init__(self, settings: TracingSettings, version: str) -> None:
        endpoint = _endpoint(settings.otlp_traces_endpoint)
        _check_headers()
        # It would repeat headers of clients, and tell of every failure.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        service = {"service.name": settings.otlp_service_name, "service.version": version}
        try:
            self._provider = TracerProvider(
                ParentBased(TraceIdRatioBased(settings.otlp_traces_ratio)),
                Resource.create(service),
                shutdown_on_exit=False,  # ``close`` does not wait as long
                span_limits=SpanLimits(max_span_attribute_length=_LONGEST),
            )
            exporter = _Telling(OTLPSpanExporter(endpoint))
            processor = BatchSpanProcessor(
                exporter, max_queue_size=QUEUE, max_export_batch_size=BATCH
            )
        except (ValueError, RuntimeError) as error:  # the latter of what is to be plugged in
            raise SettingError(f"variables of OpenTelemetry: {error}") from None
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(NAME, version)
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, scope: Scope, identity: str) -> Iterator[Callable[[int], None]]:
        """The block answers the request of this ``scope`` and id, as a part of its client's trace
        if there is one, and tells with which status."""
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        above = self._above(Headers(scope=scope))
        span = self._tracer.start_span(method, above, SpanKind.SERVER)
        kept = _Kept(self._tracer, span)
        before = spans.current.set(kept if span.is_recording() else None)
        trace = span.get_span_context()
        traced = trace_id.set(f"{trace.trace_id:032x}" if trace.is_valid else None)

        def answered(status: int) -> None:
            # What is no route of ours, and an id that nobody knows, may be all that a client likes.
            route, path = _route(scope), scope["path"]
            is_ours = path == route or (route is not None and status < 400)
            kept.set(
                {
                    "http.request.method": method,
                    "http.route": route,
                    "url.scheme": scope["scheme"],
                    "url.path": path if is_ours else None,
                    "network.protocol.version": scope["http_version"],
                    "http.response.status_code": status,
                    "http.response.header.x-request-id": [identity],
                }
            )
            if route is not None:
                span.update_name(f"{method} {route}")
            if status >= 500:
                span.set_status(StatusCode.ERROR)

        try:
            yield answered
        finally:
            span.end()
            trace_id.reset(traced)
            spans.current.reset(before)

    def _above(self, headers: Headers) -> Context:
        """The client's trace; none if it names several."""
        given = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
        several = len(given["traceparent"]) > 1
        return self._propagator.extract({} if several else given, Context())

    async def close(self) -> None:
        """Send what waits, if that does not take long."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has not waited
                loop.call_soon_threadsafe(over.set)

        # None of the loop's own threads: the interpreter waits for these when it ends.
        threading.Thread(target=shut_down, name="traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), FLUSH_TIMEOUT)


def _route(scope: Scope) -> str | None:
    """The path of the route that a request was for, as it is written in the code."""
    route = scope.get("route")
    if route is None:  # it was refused before anybody looked
        routes = scope["app"].state.routes if "app" in scope else ()
        route = next((one for one in routes if one.matches(scope)[0] is Match.FULL), None)
    return getattr(route, "path", None)


def _endpoint(url: str) -> str:
    """The address that spans are sent to. Raises SettingError."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SettingError("otlp_traces_endpoint must be a URL, such as http://collector:4318")
    if parts.username is not None or parts.query or parts.fragment:
        raise SettingError(
            "otlp_traces_endpoint: keys belong in the variable OTEL_EXPORTER_OTLP_HEADERS"
        )
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


def _check_headers() -> None:
    """Raises SettingError for what no header can hold: the exporter would repeat it in the log."""
    for name in _HEADERS:
        text = unquote(os.environ.get(name, ""))
        if not (text.isascii() and text.isprintable()):
            raise SettingError(f"{name} has characters that no header can hold")


class _Heard(logging.Handler):
    """What OpenTelemetry's exporter says of a failure, which nobody else shall hear."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self._logger = logging.getLogger("opentelemetry.exporter")
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage()[:_LONGEST])

    def close(self) -> None:
        self._logger.removeHandler(self)
        super().close()


class _Telling(SpanExporter):
    """Says in the log when ``exporter`` begins to fail, and when it works again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._heard = _Heard()
        self._works = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._heard.said.clear()
        result = self._exporter.export(spans)
        works = result is SpanExportResult.SUCCESS
        if self._works and not works:
            why = (self._heard.said or ["no reason given"])[0]
            logger.warning("traces do not reach the collector; requests go on without: %s", why)
        elif works and not self._works:
            logger.info("traces reach the collector again")
        self._works = works
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._heard.close()
