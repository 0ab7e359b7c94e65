"""Every metric of the server, in one place. The registry belongs to one app, so that tests can
have many. Engine numbers are read from the last step report when somebody scrapes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from preprocessing.pool import PoolStats
from server.keys import Keys
from server.schemas.common import PartUsage
from wire.errors import MediaRefused

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SHORT = (0.001, 0.0025, 0.005, *_SECONDS)
_TILES = (1, 2, 4, 7, 13, 26, 52, 104, 208, 416)

# field of EngineStats -> (metric, whether it only grows, help)
_ENGINE = {
    "running": ("requests_running", False, "Requests in the engine's batch."),
    "waiting": ("requests_waiting", False, "Requests waiting for room in the batch."),
    "blocks_used": ("kv_blocks_used", False, "Blocks of the KV cache in use."),
    "blocks_total": ("kv_blocks", False, "Blocks of the KV cache."),
    "vision_bytes": ("vision_cache_bytes", False, "Memory held by encoded pictures."),
    "steps": ("engine_steps", True, "Steps since the engine started."),
    "step_seconds": ("engine_step_seconds", True, "Time of all steps since the engine started."),
    "predicted_seconds": (
        "engine_step_predicted_seconds",
        True,
        "Time of these steps as it was predicted before each.",
    ),
    "encoded_tiles": ("encoded_tiles", True, "Picture tiles encoded since the engine started."),
    "cached_tokens": (
        "prefix_cache_hit_tokens",
        True,
        "Prompt tokens found in the prefix cache since the engine started.",
    ),
    "preemptions": ("preemptions", True, "Requests that lost their blocks and started again."),
}
# the same of PoolStats
_DECODERS = {
    "busy": ("decode_workers_busy", False, "Decode workers that have a job."),
    "decoded": ("decode_jobs", True, "Jobs that decode workers have done."),
    "refused": ("decode_jobs_refused", True, "Jobs whose file a decode worker refused."),
    "deaths": ("decode_worker_deaths", True, "Decode workers that died in or between jobs."),
    "timeouts": ("decode_worker_timeouts", True, "Decode workers ended for taking too long."),
    "replaced": ("decode_workers_replaced", True, "Decode workers that got a successor."),
}
# field of server.limits.Usage -> (metric, help)
_KEYS = {
    "requests": ("requests", "Requests of an API key that were let in."),
    "refused": ("requests_refused", "Requests beyond the limits of their API key."),
    "prompt_tokens": ("prompt_tokens", "Tokens in prompts, of an API key."),
    "completion_tokens": ("generated_tokens", "Tokens generated for an API key."),
    "visual_tokens": ("visual_tokens", "Tokens of pictures in prompts, of an API key."),
}


class Metrics:
    """Counters and histograms of the front end; attribute names are metric names."""

    def __init__(
        self,
        engine: EngineClient,
        decoders: Callable[[], PoolStats],
        keys: Keys,
        critic: EngineClient | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "internvl_requests", "Answered HTTP requests.", ["status"], registry=self.registry
        )
        self.in_flight = Gauge(
            "internvl_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self.queued_requests = Gauge(
            "internvl_queued_requests",
            "Choices given to the engine that have no first token yet.",
            registry=self.registry,
        )
        self.queued_tokens = Gauge(
            "internvl_queued_tokens",
            "Prompt tokens of requests that have no first token yet.",
            registry=self.registry,
        )
        self.refused = Counter(
            "internvl_requests_refused",
            "Requests refused because too much is being done already, by the error's code.",
            ["code"],
            registry=self.registry,
        )
        self.tile_bytes = Gauge(
            "internvl_request_tile_bytes",
            "Tiles of the requests being answered.",
            registry=self.registry,
        )
        self.response_bytes = Gauge(
            "internvl_response_store_bytes",
            "Kept answers of /v1/responses and their conversations.",
            registry=self.registry,
        )
        self.files = Gauge("internvl_files", "Uploaded files.", registry=self.registry)
        self.file_bytes = Gauge(
            "internvl_file_store_bytes", "Uploaded files.", registry=self.registry
        )
        self.files_evicted = Counter(
            "internvl_files_evicted",
            "Uploaded files that were dropped, because their time was over or for room.",
            ["reason"],
            registry=self.registry,
        )
        self.resumable_streams = Gauge(
            "internvl_resumable_streams", "Streams that can be resumed.", registry=self.registry
        )
        self.resumable_bytes = Gauge(
            "internvl_resumable_bytes", "Events kept of these.", registry=self.registry
        )
        self.resumed = Counter(
            "internvl_streams_resumed", "Times that a client came back.", registry=self.registry
        )
        self.finished = Counter(
            "internvl_completions",
            "Finished completions.",
            ["finish_reason"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "internvl_prompt_tokens", "Tokens in prompts.", registry=self.registry
        )
        self.generated_tokens = Counter(
            "internvl_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self.time_to_first_token = self._seconds(
            "time_to_first_token", "From request to first token."
        )
        self.queue_time = self._seconds("queue", "From asking the engine to its first token.")
        self.request_time = self._seconds("completion", "From request to last token.")
        self.media_time = self._seconds("media", "To fetch, decode and tile a request's pictures.")
        self.fetch_time = self._seconds(
            "media_fetch", "To fetch a picture; of one in a data: URL, to decode that.", _SHORT
        )
        self.decode_time = self._seconds(
            "media_decode", "To decode and tile a picture, waiting for a worker included.", _SHORT
        )
        self.encode_time = self._seconds(
            "encode", "Of the encoder for the pictures of a request.", _SHORT
        )
        self.critic_time = self._seconds("critic", "To choose one of the answers of a request.")
        self.compared = Counter(
            "internvl_best_of", "Answers chosen, by the critic.", ["critic"], registry=self.registry
        )
        if critic is not None:
            restarts = Gauge(
                "internvl_critic_restarts", "Critics' engines replaced.", registry=self.registry
            )
            restarts.set_function(lambda: critic.restarts)
        self.tiles = Histogram(
            "internvl_request_tiles",
            "Tiles of a request that has pictures.",
            buckets=_TILES,
            registry=self.registry,
        )
        self.media_refused = Counter(
            "internvl_media_refused",
            "Requests refused because of a picture, by the error's code.",
            ["code"],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))
        self.registry.register(_DecoderCollector(decoders))
        self._of_keys = CollectorRegistry()
        self._of_keys.register(_KeyCollector(keys))

    def _seconds(self, name: str, help: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"internvl_{name}_seconds", help, buckets=buckets, registry=self.registry)

    def observe_media(self, pictures: Sequence[PartUsage]) -> None:
        """What the pictures of a request took until the engine is asked."""
        self.tiles.observe(sum(picture.tiles for picture in pictures))
        for picture in pictures:
            self.fetch_time.observe(picture.fetch_ms / 1000)
            if picture.preprocess_ms:  # else its tiles were there
                self.decode_time.observe(picture.preprocess_ms / 1000)

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count what pictures and videos are refused for."""
        try:
            yield
        except MediaRefused as refusal:
            self.media_refused.labels(refusal.code).inc()
            raise

    def page(self, *, keys: bool = True) -> bytes:
        """The page a scraper reads, with or without what each of the ``keys`` has used."""
        page = generate_latest(self.registry)
        return page + generate_latest(self._of_keys) if keys else page


class _EngineCollector(Collector):
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield CounterMetricFamily(
            "internvl_engine_restarts", "Engines replaced.", value=self._engine.restarts
        )
        faults = CounterMetricFamily(
            "internvl_engine_faults", "Engines lost, by cause.", labels=["kind"]
        )
        for kind, count in self._engine.faults.items():
            faults.add_metric([kind], count)
        yield faults
        yield CounterMetricFamily(
            "internvl_requests_given_up",
            "Requests that got an error because engines died of them.",
            value=self._engine.convicted,
        )
        yield from _families(_ENGINE, stats)


class _DecoderCollector(Collector):
    def __init__(self, stats: Callable[[], PoolStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        return _families(_DECODERS, self._stats())


class _KeyCollector(Collector):
    """One label per key in force: there are server.keys.MAX_KEYS at most."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "internvl_key_requests_running", "Requests of an API key.", labels=["key"]
        )
        families = {
            field: CounterMetricFamily(f"internvl_key_{name}", help, labels=["key"])
            for field, (name, help) in _KEYS.items()
        }
        for name, account in self._keys.accounts.items():
            running.add_metric([name], account.running)
            for field, family in families.items():
                family.add_metric([name], getattr(account.usage, field))
        yield running
        yield from families.values()


def _families(table: dict[str, tuple[str, bool, str]], stats: object) -> Iterator[Metric]:
    for field, (name, grows, help) in table.items():
        family = CounterMetricFamily if grows else GaugeMetricFamily
        yield family("internvl_" + name, help, value=getattr(stats, field))
