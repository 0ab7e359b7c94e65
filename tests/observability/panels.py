"""What Grafana's dashboard shows: rows of panels, and their queries."""

from collections.abc import Sequence
from typing import NamedTuple

# What every query looks at: the replicas that are chosen at the top of the page.
CHOSEN = '{job=~"$job", instance=~"$instance"'
HEIGHT = 8


class Panel(NamedTuple):
    """A graph, or a number; ``queries`` by what their lines are called. Values from ``warn`` on are
    yellow, from ``bad`` on red."""

    title: str
    about: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    stacked: bool = False
    most: float | None = None
    warn: float | None = None
    bad: float | None = None
    number: bool = False
    height: int = HEIGHT


def number(
    title: str, about: str, unit: str, queries: dict[str, str], **marks: float | None
) -> Panel:
    """A small panel with nothing but a number; ``marks`` are ``warn`` and ``bad``."""
    return Panel(title, about, unit, queries, width=4, number=True, height=4, **marks)


def every(name: str, *matchers: str) -> str:
    """The series of a metric, of all that is chosen."""
    return f"internvl_{name}" + ", ".join([CHOSEN, *matchers]) + "}"


def rate(name: str, *matchers: str, by: str = "") -> str:
    """Per second."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({every(name, *matchers)}[$__rate_interval]))"


def total(name: str, *matchers: str, by: str = "") -> str:
    group = f" by ({by})" if by else ""
    return f"sum{group} ({every(name, *matchers)})"


def quantiles(name: str, *parts: float) -> dict[str, str]:
    return {f"p{part * 100:g}": quantile(name, part) for part in parts or (0.5, 0.9, 0.99)}


def quantile(name: str, part: float) -> str:
    return f"histogram_quantile({part}, {rate(name + '_bucket', by='le')})"


def mean(name: str) -> str:
    return f"{rate(name + '_sum')} / {rate(name + '_count')}"


def share(name: str, *matchers: str) -> str:
    """Of a counter, what has these labels."""
    return f"({rate(name, *matchers)} or vector(0)) / {rate(name)}"


def hits(cache: str) -> str:
    return f"{rate(f'{cache}_cache_hits_total')} / {rate(f'{cache}_cache_queries_total')}"


def increase(name: str, by: str) -> str:
    return f"sum by ({by}) (increase({every(name)}[$__rate_interval]))"


ROWS: dict[str, Sequence[Panel]] = {
    "Traffic and errors": (
        number(
            "Replicas ready",
            "Servers whose model is loaded and that take work.",
            "short",
            {"ready": total("state", 'state="ready"')},
        ),
        number(
            "Requests in flight",
            "HTTP requests being answered; --max-concurrent-requests bounds them per replica.",
            "short",
            {"in flight": total("requests_in_flight")},
        ),
        number(
            "Requests per second",
            "Answered, whatever the status; but for probes.",
            "reqps",
            {"requests": rate("http_requests_total")},
        ),
        number(
            "Tokens per second",
            "Generated, by all replicas.",
            "short",
            {"tokens": rate("generation_tokens_total")},
        ),
        number(
            "Failed",
            "Share of requests answered with 5xx.",
            "percentunit",
            {"5xx": share("http_requests_total", 'status=~"5.."')},
            warn=0.01,
            bad=0.05,
        ),
        number(
            "First token",
            "Nine of ten requests had their first token after so long.",
            "s",
            {"p90": quantile("time_to_first_token_seconds", 0.9)},
            warn=5,
            bad=10,
        ),
        Panel(
            "Requests by status",
            "499: the client left before its answer began. A stream that failed later is a 200; "
            "see the ends of answers.",
            "reqps",
            {"{{status}}": rate("http_requests_total", by="status")},
            stacked=True,
        ),
        Panel(
            "Errors",
            "Shares of all requests: failures of the server (5xx), and refusals because too much "
            "is being done already or a key's limit is reached (429).",
            "percentunit",
            {
                "5xx": share("http_requests_total", 'status=~"5.."'),
                "429": share("http_requests_total", 'status="429"'),
            },
            most=1,
        ),
        Panel(
            "Refused by code",
            "What there was too much of: requests, waiting choices, waiting tokens, pictures. "
            "Limits of keys are below.",
            "reqps",
            {"{{code}}": rate("requests_refused_total", by="code")},
            stacked=True,
        ),
        Panel(
            "Tokens",
            "Of prompts, pictures included, and generated.",
            "short",
            {
                "prompt": rate("prompt_tokens_total"),
                "generated": rate("generation_tokens_total"),
            },
            width=12,
        ),
        Panel(
            "Ends of answers",
            "Choices by why they ended. abort: the client left, or it or an operator ended it.",
            "short",
            {"{{finished_reason}}": rate("request_success_total", by="finished_reason")},
            width=12,
            stacked=True,
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            "From the arrival of a request: reading it, pictures, queue and prefill.",
            "s",
            quantiles("time_to_first_token_seconds"),
        ),
        Panel(
            "Between tokens",
            "Between the arrivals of two tokens of a choice: how smoothly streams run.",
            "s",
            quantiles("inter_token_latency_seconds"),
        ),
        Panel(
            "Whole requests",
            "From the arrival of a request to its end.",
            "s",
            quantiles("e2e_request_latency_seconds"),
        ),
        Panel(
            "Where the time goes",
            "Means of the parts of a request, one upon the other: its pictures, the queue, the "
            "prompt, the answer.",
            "s",
            {
                "media": mean("request_media_time_seconds"),
                "queue": mean("request_queue_time_seconds"),
                "prefill": mean("request_prefill_time_seconds"),
                "decode": mean("request_decode_time_seconds"),
            },
            stacked=True,
        ),
        Panel(
            "Queue and prefill",
            "Nine of ten choices waited so long for a place in the batch, and then so long for "
            "their first token.",
            "s",
            {
                "queue": quantile("request_queue_time_seconds", 0.9),
                "prefill": quantile("request_prefill_time_seconds", 0.9),
            },
        ),
        Panel(
            "Time per token",
            "Decode time of a choice over its tokens.",
            "s",
            quantiles("request_time_per_output_token_seconds"),
        ),
    ),
    "Queue and KV cache": (
        Panel(
            "Choices running and waiting",
            "In the batch, and without a first token yet.",
            "short",
            {
                "running": total("num_requests_running"),
                "waiting": total("num_requests_waiting"),
            },
        ),
        Panel(
            "Tokens waiting",
            "Of prompts that have no first token yet, and those of pictures among them.",
            "short",
            {
                "prompts": total("num_prompt_tokens_waiting"),
                "pictures": total("num_visual_tokens_waiting"),
            },
        ),
        Panel(
            "KV cache in use",
            "Part of each replica's cache. What is full, and preemptions: answers wait for memory.",
            "percentunit",
            {"{{instance}}": every("kv_cache_usage_perc")},
            most=1,
            warn=0.8,
            bad=0.95,
        ),
        Panel(
            "Preemptions",
            "Choices that lost their blocks of the cache and are computed again.",
            "short",
            {"{{instance}}": increase("num_preemptions_total", "instance")},
        ),
        Panel(
            "Time of a step",
            "Of the engine, and as predicted before: --step-budget-ms is met as well as the "
            "prediction is.",
            "s",
            {
                "taken": f"{rate('engine_step_seconds_total')} / {rate('engine_steps_total')}",
                "predicted": f"{rate('engine_step_predicted_seconds_total')} / "
                f"{rate('engine_steps_total')}",
            },
        ),
        Panel(
            "Tokens on trial",
            "Computed because they came next before in the same text, and of these right: each of "
            "them saved its sequence a step.",
            "short",
            {
                "tried": rate("spec_decode_num_draft_tokens_total"),
                "right": rate("spec_decode_num_accepted_tokens_total"),
            },
        ),
        Panel(
            "Lengths",
            "Tokens of prompts and of answers.",
            "short",
            {
                "prompt p50": quantile("request_prompt_tokens", 0.5),
                "prompt p95": quantile("request_prompt_tokens", 0.95),
                "answer p50": quantile("request_generation_tokens", 0.5),
                "answer p95": quantile("request_generation_tokens", 0.95),
            },
        ),
    ),
    "Pictures and videos": (
        Panel(
            "Stages, p95",
            "Of a picture or video: to its bytes, waiting for a decode worker, to pixels, to "
            "tiles, and the vision encoder.",
            "s",
            {
                stage: quantile(f"media_{stage}_seconds", 0.95)
                for stage in ("fetch", "queue", "decode", "tile", "encode")
            },
        ),
        Panel(
            "Stages, mean",
            "The same, one upon the other.",
            "s",
            {
                stage: mean(f"media_{stage}_seconds")
                for stage in ("fetch", "queue", "decode", "tile", "encode")
            },
            stacked=True,
        ),
        Panel(
            "Size of requests",
            "Of requests with pictures: their tiles, and their tokens of pictures.",
            "short",
            {
                "tiles p50": quantile("request_tiles", 0.5),
                "tiles p95": quantile("request_tiles", 0.95),
                "visual tokens p50": quantile("request_visual_tokens", 0.5),
                "visual tokens p95": quantile("request_visual_tokens", 0.95),
            },
        ),
        Panel(
            "Rejected by reason",
            "Requests refused because of a picture or video: damaged, too large, out of reach, …",
            "reqps",
            {"{{reason}}": rate("media_rejected_total", by="reason")},
            width=6,
            stacked=True,
        ),
        Panel(
            "Sandbox kills by reason",
            "Decode workers that died or were ended. Some files do it on purpose.",
            "short",
            {"{{reason}}": increase("sandbox_kills_total", "reason")},
            width=6,
            stacked=True,
        ),
        Panel(
            "Decode workers",
            "With a job, on the average; and jobs per second.",
            "short",
            {
                "busy": total("decode_workers_busy"),
                "tiled per second": rate("decode_jobs_total"),
                "refused per second": rate("decode_jobs_refused_total"),
            },
            width=6,
        ),
        Panel(
            "Tiles of open requests",
            "Kept until the answer ends; --request-tile-bytes bounds them per replica.",
            "bytes",
            {"{{instance}}": every("request_tile_bytes")},
            width=6,
        ),
    ),
    "Caches and stores": (
        Panel(
            "Hits",
            "Shares: prompt tokens found in the prefix cache, pictures that were encoded already, "
            "pictures and videos that were tiled already.",
            "percentunit",
            {
                "prefixes": hits("prefix"),
                "encoded pictures": hits("vision"),
                "tiles": hits("tile"),
            },
            most=1,
        ),
        Panel(
            "Memory",
            "Of encoded pictures (the engine's), and of answers, files and streams that are kept "
            "(the API process's).",
            "bytes",
            {
                "encoded pictures": total("vision_cache_bytes"),
                "responses": total("response_store_bytes"),
                "files": total("file_store_bytes"),
                "streams": total("resumable_bytes"),
            },
        ),
        Panel(
            "Kept files and streams",
            "Uploaded files, files dropped by reason, streams that can be resumed, and clients "
            "that came back to theirs.",
            "short",
            {
                "files": total("files"),
                "dropped: {{reason}}": increase("files_evicted_total", "reason"),
                "streams": total("resumable_streams"),
                "came back": f"sum (increase({every('streams_resumed_total')}[$__rate_interval]))",
            },
        ),
    ),
    "Engines and processes": (
        Panel(
            "Engine ready",
            "1 while the engine of a replica is ready.",
            "short",
            {"{{instance}}": every("engine_up")},
            width=6,
            most=1,
        ),
        Panel(
            "Engines lost",
            "By cause: loading, a step, silence, another death; and those that got a successor.",
            "short",
            {
                "{{kind}}": increase("engine_faults_total", "kind"),
                "replaced": f"sum (increase({every('engine_restarts_total')}[$__rate_interval]))",
            },
            width=6,
        ),
        Panel(
            "Choices that met a lost engine",
            "Resumed by its successor, or given up because engines died of them.",
            "short",
            {
                name.replace("_", " "): f"sum (increase({every(f'requests_{name}_total')}"
                "[$__rate_interval]))"
                for name in ("resumed", "given_up")
            },
            width=6,
        ),
        Panel(
            "Lag of the event loop",
            "How late a timer of the API process comes, 99 of 100 times: all clients wait so long.",
            "s",
            {"p99": quantile("event_loop_lag_seconds", 0.99)},
            width=6,
            warn=0.1,
            bad=0.5,
        ),
        Panel(
            "Processors",
            "Cores in use by the API process and by the engine.",
            "short",
            {
                "API": f"sum (rate(process_cpu_seconds_total{CHOSEN}}}[$__rate_interval]))",
                "engine": rate("engine_process_cpu_seconds_total"),
            },
        ),
        Panel(
            "Main memory",
            "Resident memory of the API process and of the engine of each replica.",
            "bytes",
            {
                "API {{instance}}": f"process_resident_memory_bytes{CHOSEN}}}",
                "engine {{instance}}": every("engine_process_resident_memory_bytes"),
            },
        ),
        Panel(
            "Open files",
            "Of the API process, of the most it may have: each connection is one.",
            "percentunit",
            {"{{instance}}": f"process_open_fds{CHOSEN}}} / process_max_fds{CHOSEN}}}"},
            most=1,
            warn=0.7,
            bad=0.9,
        ),
    ),
    "API keys": (
        Panel(
            "Requests by key",
            "Let in. With an operators' port these metrics are there, and nothing is shown unless "
            "it is scraped.",
            "reqps",
            {"{{key}}": rate("key_requests_total", by="key")},
            width=6,
            stacked=True,
        ),
        Panel(
            "Refused by key",
            "Beyond the limits of the key.",
            "reqps",
            {"{{key}}": rate("key_requests_refused_total", by="key")},
            width=6,
            stacked=True,
        ),
        Panel(
            "Tokens by key",
            "Of prompts and answers.",
            "short",
            {
                "{{key}}: prompts": rate("key_prompt_tokens_total", by="key"),
                "{{key}}: generated": rate("key_generation_tokens_total", by="key"),
                "{{key}}: pictures": rate("key_visual_tokens_total", by="key"),
            },
            width=6,
        ),
        Panel(
            "Running by key",
            "Requests being answered.",
            "short",
            {"{{key}}": total("key_requests_running", by="key")},
            width=6,
            stacked=True,
        ),
    ),
}
