"""Settings of traces, a part of wire.settings."""

import dataclasses

from wire.knob import knob


@dataclasses.dataclass(frozen=True)
class TracingSettings:
    """Where traces go. The variables OTEL_EXPORTER_OTLP_* of OpenTelemetry hold the rest: headers,
    certificates, compression."""

    otlp_traces_endpoint: str = knob(
        "",
        "URL of a collector that takes traces by OTLP over HTTP, such as "
        "http://collector:4318/v1/traces (what is added where there is no path); default: no "
        "traces.",
    )
    otlp_traces_ratio: float = knob(
        1.0,
        "Share of the requests that are traced where their client has not decided it, by the "
        "header traceparent.",
        low=0,
        high=1,
    )
    otlp_service_name: str = knob("internvl-server", "What this server is called in traces.")
