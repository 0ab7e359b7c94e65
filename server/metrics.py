"""The numbers behind the names of ``server.metric_table``: counted here by the front end, read from
their owners when somebody scrapes. They belong to one app, so that tests can have many. Nothing
is locked: whoever counts does so in the event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from engine.client import EngineClient
from preprocessing.media import Spent
from preprocessing.pool import MediaStats
from server.keys import Keys
from server.metric_table import TABLE, Row
from server.schemas.common import PartUsage
from wire.errors import MediaRefused
from wire.histogram import Histogram

OTHER = "other"
"""Stands for every value of a label that nobody has foreseen."""

# Statuses that are answered, and those that only the access log has.
_STATUSES = frozenset(str(int(status)) for status in HTTPStatus) | {"499"}
# Seconds between two tries of the event loop.
_LAG_INTERVAL = 1.0

# metric -> field of EngineStats
_ENGINE = {
    "internvl_num_requests_running": "running",
    "internvl_kv_blocks": "blocks_total",
    "internvl_kv_blocks_used": "blocks_used",
    "internvl_vision_cache_bytes": "vision_bytes",
    "internvl_prefix_cache_queries_total": "prefix_queries",
    "internvl_prefix_cache_hits_total": "cached_tokens",
    "internvl_vision_cache_queries_total": "vision_queries",
    "internvl_vision_cache_hits_total": "vision_hits",
    "internvl_num_preemptions_total": "preemptions",
    "internvl_encoded_tiles_total": "encoded_tiles",
    "internvl_spec_decode_num_draft_tokens_total": "speculated_tokens",
    "internvl_spec_decode_num_accepted_tokens_total": "accepted_tokens",
    "internvl_engine_steps_total": "steps",
    "internvl_engine_step_seconds_total": "step_seconds",
    "internvl_engine_step_predicted_seconds_total": "predicted_seconds",
}
# metric -> field of MediaStats
_MEDIA = {
    "internvl_sandbox_kills_total": "kills",
    "internvl_decode_workers_replaced_total": "replaced",
    "internvl_decode_workers_busy": "busy",
    "internvl_decode_jobs_total": "decoded",
    "internvl_decode_jobs_refused_total": "refused",
    "internvl_tile_cache_queries_total": "tile_queries",
    "internvl_tile_cache_hits_total": "tile_hits",
}
# metric -> field of server.limits.Usage
_KEYS = {
    "internvl_key_requests_total": "requests",
    "internvl_key_requests_refused_total": "refused",
    "internvl_key_prompt_tokens_total": "prompt_tokens",
    "internvl_key_generation_tokens_total": "completion_tokens",
    "internvl_key_visual_tokens_total": "visual_tokens",
}

Source = Callable[[], float | Mapping[str, float] | Mapping[str, str] | None] | Histogram
"""Where a row's numbers are: one, or one for each value of its label, or the labels of an info.
None: there is nothing to tell yet."""


class Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """Count so many."""
        self.value += amount


class Tally:
    """Counts for each value of a label. Those that are not among the ``known`` are one: what a
    client sends can make no new one. With ``shown`` all stand there from the start, at 0."""

    def __init__(self, known: Collection[str], *, shown: bool = True) -> None:
        self._known = known
        self.counts: dict[str, float] = dict.fromkeys(known, 0) if shown else {}

    def add(self, value: str) -> None:
        """Count one."""
        value = value if value in self._known else OTHER
        self.counts[value] = self.counts.get(value, 0) + 1


class Metrics:
    """What the front end counts, and all that a scrape has: see ``show``."""

    def __init__(
        self,
        engine: EngineClient,
        media: Callable[[], MediaStats],
        keys: Keys,
        critic: EngineClient | None = None,
    ) -> None:
        self._sources: dict[str, Source] = {"internvl_inter_token_latency_seconds": engine.gaps}
        self._engine = engine
        self.requests = Tally(_STATUSES, shown=False)
        self.show(internvl_http_requests_total=lambda: self.requests.counts)
        self.refused = self._tally("internvl_requests_refused_total")
        self.finished = self._tally("internvl_request_success_total")
        self.media_rejected = self._tally("internvl_media_rejected_total")
        self.compared = self._tally("internvl_best_of_total")
        self.files_evicted = self._tally("internvl_files_evicted_total")
        self.prompt_tokens = self._count("internvl_prompt_tokens_total")
        self.generation_tokens = self._count("internvl_generation_tokens_total")
        self.streams_resumed = self._count("internvl_streams_resumed_total")
        histogram = self._histogram
        self.time_to_first_token = histogram("internvl_time_to_first_token_seconds")
        self.e2e_latency = histogram("internvl_e2e_request_latency_seconds")
        self.time_per_token = histogram("internvl_request_time_per_output_token_seconds")
        self.media_time = histogram("internvl_request_media_time_seconds")
        self.queue_time = histogram("internvl_request_queue_time_seconds")
        self.prefill_time = histogram("internvl_request_prefill_time_seconds")
        self.decode_time = histogram("internvl_request_decode_time_seconds")
        self.inference_time = histogram("internvl_request_inference_time_seconds")
        self.prompt_length = histogram("internvl_request_prompt_tokens")
        self.generation_length = histogram("internvl_request_generation_tokens")
        self.visual_length = histogram("internvl_request_visual_tokens")
        self.tiles = histogram("internvl_request_tiles")
        self.media_fetch = histogram("internvl_media_fetch_seconds")
        self.media_queue = histogram("internvl_media_queue_seconds")
        self.media_decode = histogram("internvl_media_decode_seconds")
        self.media_tile = histogram("internvl_media_tile_seconds")
        self.media_encode = histogram("internvl_media_encode_seconds")
        self.critic_time = histogram("internvl_critic_seconds")
        self.loop_lag = histogram("internvl_event_loop_lag_seconds")
        self.show(
            internvl_engine_up=lambda: engine.state == "ready",
            internvl_engine_restarts_total=lambda: engine.restarts,
            internvl_engine_faults_total=lambda: engine.faults,
            internvl_requests_resumed_total=lambda: engine.resumed,
            internvl_requests_given_up_total=lambda: engine.convicted,
            internvl_kv_cache_usage_perc=lambda: (
                engine.stats.blocks_used / max(1, engine.stats.blocks_total)
            ),
            internvl_critic_restarts_total=lambda: critic.restarts if critic else 0,
            **{name: partial(_of_engine, engine, field) for name, field in _ENGINE.items()},
            **{name: partial(_field, media, field) for name, field in _MEDIA.items()},
        )
        of_keys: dict[str, Source] = {
            name: partial(_of_keys, keys, field) for name, field in _KEYS.items()
        }
        of_keys["internvl_key_requests_running"] = lambda: {
            name: account.running for name, account in keys.accounts.items()
        }
        self._public = self._registry(self._sources)
        self._whole = self._registry(self._sources, of_keys)

    def show(self, **sources: Source) -> None:
        """Where the numbers of more metrics are."""
        self._sources |= sources

    def _count(self, name: str) -> Count:
        count = Count()
        self._sources[name] = lambda: count.value
        return count

    def _tally(self, name: str) -> Tally:
        tally = Tally(TABLE[name].values)
        self._sources[name] = lambda: tally.counts
        return tally

    def _histogram(self, name: str) -> Histogram:
        histogram = self._sources[name] = Histogram(TABLE[name].bounds)
        return histogram

    def _registry(self, *sources: Mapping[str, Source]) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(_Sources(sources))
        ProcessCollector(registry=registry)
        ProcessCollector("internvl_engine", lambda: self._engine.pid or 0, registry=registry)
        return registry

    def observe_media(self, pictures: Sequence[PartUsage], spent: Sequence[Spent]) -> None:
        """What the pictures of a request took until the engine is asked."""
        self.tiles.observe(sum(picture.tiles for picture in pictures))
        self.visual_length.observe(sum(picture.tokens for picture in pictures))
        for one in spent:
            self.media_fetch.observe(one.fetch)
            if one.prepare:  # else its tiles were there
                self.media_queue.observe(one.queue)
                self.media_decode.observe(one.decode)
                self.media_tile.observe(one.tile)

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count what pictures and videos are refused for."""
        try:
            yield
        except MediaRefused as refusal:
            self.media_rejected.add(refusal.code)
            raise

    async def watch_loop(self) -> None:
        """Try again and again how late the event loop is; never returns."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self.loop_lag.observe(max(0.0, loop.time() - due))

    def page(self, accept: str = "", *, keys: bool = True) -> tuple[bytes, str]:
        """What a scraper that accepts such a type reads, and its type; with or without what each
        of the ``keys`` has used."""
        try:
            encode, content_type = choose_encoder(accept)
        except TypeError:  # it compares versions that are no numbers
            encode, content_type = choose_encoder("")
        return encode(self._whole if keys else self._public), content_type


def _of_engine(engine: EngineClient, field: str) -> float:
    """A gauge of the engine, or a counter of all engines that there were."""
    return float(getattr(engine.stats, field) + getattr(engine.past, field))


def _field(stats: Callable[[], object], field: str) -> Any:
    return getattr(stats(), field)


def _of_keys(keys: Keys, field: str) -> dict[str, float]:
    """One value for each key in force: there are server.keys.MAX_KEYS at most."""
    return {name: getattr(account.usage, field) for name, account in keys.accounts.items()}


class _Sources(Collector):
    """Reads them in the order of the table."""

    def __init__(self, sources: Sequence[Mapping[str, Source]]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for name, row in TABLE.items():
            for sources in self._sources:
                if name in sources and (family := _family(row, sources[name])) is not None:
                    yield family


def _family(row: Row, source: Source) -> Metric | None:
    if isinstance(source, Histogram):
        return HistogramMetricFamily(row.name, row.help, list(source.buckets()), source.sum)
    found = source()
    if found is None:
        return None
    if row.kind == "info":
        info = InfoMetricFamily(row.name.removesuffix("_info"), row.help)
        info.add_metric((), found)  # type: ignore[arg-type]
        return info
    make = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = make(row.name, row.help, labels=row.labels)
    labelled = found if isinstance(found, Mapping) else {None: found}
    for value, number in labelled.items():
        family.add_metric(() if value is None else (value,), number)  # type: ignore[arg-type]
    return family
