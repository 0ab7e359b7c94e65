"""Counts by size agree with those of prometheus_client, whose cost nobody wants for every token."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Official

from wire.histogram import Histogram

BOUNDS = (0.5, 1, 2.5, 100_000)


@given(st.lists(st.sampled_from((0.0, 0.5, 0.50001, 1, 2.4, 2.5, 2.6, 1e5, 1e6, 7.25))))
def test_buckets_sum_and_count_are_the_official_ones(values: list[float]) -> None:
    ours = Histogram(BOUNDS)
    registry = CollectorRegistry()
    theirs = Official("h", "h", buckets=BOUNDS, registry=registry)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    (family,) = registry.collect()
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    buckets = {("h_bucket", bound): count for bound, count in ours.buckets()}
    assert buckets | {("h_count", None): ours.count, ("h_sum", None): ours.sum} == found
