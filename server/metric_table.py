"""Every metric of the server: what a scrape of ``/metrics`` has, no more and no less. The numbers
come from ``server.metrics``. ``python -m server.metric_table > docs/metrics.md`` writes the page.
"""

import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

from engine.client import FAULTS
from preprocessing.pool import KILLS
from wire.histogram import TOKEN_SECONDS

FINISHED = ("stop", "length", "tool_calls", "abort", "stuck", "error")
STATES = ("starting", "ready", "draining", "failed")
REFUSALS = ("too_many_requests", "queue_full_requests", "queue_full_tokens", "too_many_pictures")
MEDIA_REFUSALS = (
    *("invalid_media", "media_forbidden", "media_timeout", "media_too_large"),
    *("media_unreachable", "too_many_frames", "unsupported_media"),
)
CRITICS = ("logprob", "vote", "visualprm")

_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0),
)
_SHORT = (0.001, 0.0025, 0.005, *_SECONDS[:-2])
_TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
    *(10_000, 20_000, 50_000, 100_000),
)
_TILES = (1, 2, 4, 7, 13, 26, 52, 104, 208, 416)

Kind = Literal["counter", "gauge", "histogram", "info"]


class Row(NamedTuple):
    """One metric. ``values`` are all that its label can have where they are known; ``bounds`` are
    those of a histogram's buckets."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


def _counter(name: str, help: str, label: str = "", values: tuple[str, ...] = ()) -> Row:
    return Row(f"internvl_{name}_total", "counter", help, (label,) if label else (), values)


def _gauge(name: str, help: str, label: str = "", values: tuple[str, ...] = ()) -> Row:
    return Row(f"internvl_{name}", "gauge", help, (label,) if label else (), values)


def _seconds(name: str, help: str, bounds: tuple[float, ...] = _SECONDS) -> Row:
    return Row(f"internvl_{name}_seconds", "histogram", help, bounds=bounds)


def _amount(name: str, help: str, bounds: tuple[float, ...]) -> Row:
    return Row(f"internvl_{name}", "histogram", help, bounds=bounds)


def _process(prefix: str, whose: str) -> tuple[Row, ...]:
    return (
        Row(f"{prefix}cpu_seconds_total", "counter", f"Processor time of {whose}."),
        Row(f"{prefix}resident_memory_bytes", "gauge", f"Resident memory of {whose}."),
        Row(f"{prefix}virtual_memory_bytes", "gauge", f"Virtual memory of {whose}."),
        Row(f"{prefix}start_time_seconds", "gauge", f"When {whose} began, since the epoch."),
        Row(f"{prefix}open_fds", "gauge", f"Open file descriptors of {whose}."),
        Row(f"{prefix}max_fds", "gauge", f"Most file descriptors of {whose}."),
    )


# Heading -> rows.
SECTIONS: dict[str, tuple[Row, ...]] = {
    "What waits and runs": (
        _gauge("num_requests_running", "Choices in the engine's batch."),
        _gauge(
            "num_requests_waiting",
            "Choices of let-in requests that have no first token yet; --max-num-queued-reqs "
            "bounds them.",
        ),
        _gauge(
            "num_prompt_tokens_waiting",
            "Tokens of their prompts, pictures included; --max-num-queued-tokens bounds them.",
        ),
        _gauge("num_visual_tokens_waiting", "Of these the tokens of pictures and videos."),
        _gauge("requests_in_flight", "HTTP requests being answered."),
    ),
    "Requests": (
        _counter("http_requests", "Answered HTTP requests, but for probes.", "status"),
        _counter(
            "requests_refused",
            "Requests refused because too much is being done already, by the error's code.",
            "code",
            REFUSALS,
        ),
        _counter(
            "request_success",
            "Choices that ended, by why; abort: the client left, or it or an operator ended it; "
            "stuck: its own parameters left no token to go on with.",
            "finished_reason",
            FINISHED,
        ),
        _counter("prompt_tokens", "Tokens of prompts, pictures included, once for all choices."),
        _counter("generation_tokens", "Tokens generated, counted as they arrive."),
        _seconds("time_to_first_token", "From the arrival of a request to its first token."),
        _seconds(
            "e2e_request_latency",
            "From the arrival of a request to its end, however; to choose the best of its answers "
            "takes internvl_critic_seconds more.",
        ),
        _seconds(
            "inter_token_latency",
            "Between the arrivals of two tokens of a choice from the engine. Of tokens that come "
            "together each has its part.",
            TOKEN_SECONDS,
        ),
        _seconds(
            "request_time_per_output_token",
            "Decode time of a choice over its tokens but the first, those cut off behind a stop "
            "string among them.",
            TOKEN_SECONDS,
        ),
        _seconds("request_media_time", "To load all pictures of a request, waiting included."),
        _seconds("request_queue_time", "Of a choice, from the engine's door into its batch."),
        _seconds("request_prefill_time", "Of a choice, from there to its first token."),
        _seconds("request_decode_time", "Of a choice, from there to its last token."),
        _seconds("request_inference_time", "Prefill and decode of a choice."),
        _amount("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS),
        _amount("request_generation_tokens", "Tokens of a choice.", _TOKENS),
        _amount(
            "request_visual_tokens", "Tokens of pictures, of a request that has some.", _TOKENS
        ),
        _amount("request_tiles", "Tiles of pictures, of a request that has some.", _TILES),
    ),
    "Pictures and videos": (
        _seconds(
            "media_fetch",
            "From the URL of a picture or video to its bytes; data: URLs too.",
            _SHORT,
        ),
        _seconds(
            "media_queue",
            "Waiting for a decode worker, and for the bytes to go there and back.",
            _SHORT,
        ),
        _seconds("media_decode", "A decode worker, from the bytes to pixels.", _SHORT),
        _seconds("media_tile", "A decode worker, from pixels to tiles.", _SHORT),
        _seconds(
            "media_encode", "The vision encoder, for all tiles of a picture or video.", _SHORT
        ),
        _counter(
            "media_rejected",
            "Requests and previews refused for a picture or video, by the error's code.",
            "reason",
            MEDIA_REFUSALS,
        ),
        _counter("sandbox_kills", "Decode workers that died or were ended.", "reason", KILLS),
        _counter("decode_workers_replaced", "Decode workers that got a successor."),
        _gauge("decode_workers_busy", "Decode workers that have a job."),
        _counter("decode_jobs", "Pictures and videos that decode workers have tiled."),
        _counter("decode_jobs_refused", "Jobs whose file a decode worker refused."),
        _gauge("request_tile_bytes", "Tiles of the requests being answered."),
        _counter("tile_cache_queries", "Pictures and videos looked up among those tiled before."),
        _counter("tile_cache_hits", "Of these found."),
    ),
    "Engine": (
        _gauge("engine_up", "1 while the engine is ready, else 0."),
        _gauge("state", "1 for what the server is, else 0.", "state", STATES),
        _counter("engine_restarts", "Engines replaced."),
        _counter("engine_faults", "Engines lost, by cause.", "kind", FAULTS),
        _counter("requests_resumed", "Choices that went on in the successor of a lost engine."),
        _counter("requests_given_up", "Choices that got an error because engines died of them."),
        _gauge("kv_cache_usage_perc", "Part of the KV cache that is in use, 0 to 1."),
        _gauge("kv_blocks", "Blocks of the KV cache."),
        _gauge("kv_blocks_used", "Of these in use."),
        _gauge("vision_cache_bytes", "Memory held by encoded pictures."),
        _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
        _counter("prefix_cache_hits", "Of these found, and not computed again."),
        _counter("vision_cache_queries", "Pictures looked up among those encoded before."),
        _counter("vision_cache_hits", "Of these found."),
        _counter("num_preemptions", "Choices that lost their blocks and started again."),
        _counter("encoded_tiles", "Tiles encoded."),
        _counter("spec_decode_num_draft_tokens", "Tokens computed on trial."),
        _counter("spec_decode_num_accepted_tokens", "Of these right, and part of an answer."),
        _counter("engine_steps", "Steps of the engine."),
        _counter("engine_step_seconds", "Time of these."),
        _counter("engine_step_predicted_seconds", "Their time as predicted before each."),
        _counter("best_of", "Answers chosen, by the critic.", "critic", CRITICS),
        _seconds("critic", "To choose one of the answers of a request."),
        _counter("critic_restarts", "Critics' engines replaced."),
    ),
    "API keys": (
        _gauge("key_requests_running", "Requests of an API key being answered.", "key"),
        _counter("key_requests", "Requests of an API key that were let in.", "key"),
        _counter("key_requests_refused", "Requests beyond the limits of their API key.", "key"),
        _counter("key_prompt_tokens", "Tokens of prompts, of an API key.", "key"),
        _counter("key_generation_tokens", "Tokens generated for an API key.", "key"),
        _counter("key_visual_tokens", "Tokens of pictures in prompts, of an API key.", "key"),
    ),
    "What is kept": (
        _gauge("response_store_bytes", "Answers of /v1/responses and their conversations."),
        _gauge("files", "Uploaded files."),
        _gauge("file_store_bytes", "Bytes of these."),
        _counter(
            "files_evicted",
            "Uploaded files dropped: their time was over, or for room.",
            "reason",
            ("expired", "room"),
        ),
        _gauge("resumable_streams", "Streams that their clients can resume."),
        _gauge("resumable_bytes", "Events kept of these."),
        _counter("streams_resumed", "Times that a client came back to its stream."),
    ),
    "Processes": (
        Row("internvl_build_info", "info", "What runs.", ("version", "model", "python")),
        Row(
            "internvl_cache_config_info",
            "info",
            "How the engine computes; there when it is ready.",
            (
                *("block_size", "num_gpu_blocks", "enable_prefix_caching"),
                *("device", "dtype", "attention", "max_model_len"),
            ),
        ),
        _seconds(
            "event_loop_lag",
            "How late a timer of the API process was, tried each second; all clients wait so long.",
            _SHORT,
        ),
        *_process("process_", "the API process"),
        *_process("internvl_engine_process_", "the engine process, without further ranks"),
    ),
}

TABLE = {row.name: row for rows in SECTIONS.values() for row in rows}
"""By name."""


def page() -> Iterator[str]:
    """Lines of docs/metrics.md."""
    yield "# Metrics\n"
    yield "Written by `python -m server.metric_table`; a test keeps it current.\n"
    yield "`GET /metrics` answers in Prometheus' text format, or in OpenMetrics where the scraper"
    yield "asks for it. Names are those of vLLM where both measure the same. A request has `n`"
    yield "choices. Counters never fall while the server runs, even where engines die, but for"
    yield "those of the engine process. Metrics with the label `key` stand on the `admin_port`"
    yield "alone where there is one.\n"
    yield "What a request takes, in order: `request_media_time`, `request_queue_time`,"
    yield "`request_prefill_time`, `request_decode_time`. The last three are of choices that have a"
    yield "token. Preemption, and an engine that dies, lengthen the time in which they happen.\n"
    for heading, rows in SECTIONS.items():
        yield f"## {heading}\n"
        yield "| name | type | labels | says |"
        yield "| --- | --- | --- | --- |"
        for row in rows:
            labels = ", ".join(f"`{label}`" for label in row.labels)
            if row.values:
                labels += ": " + ", ".join(f"`{value}`" for value in row.values)
            yield f"| `{row.name}` | {row.kind} | {labels} | {row.help} |"
        yield ""


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()))
