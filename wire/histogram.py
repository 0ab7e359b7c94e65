"""Counts by size, in plain integers: what is observed for every token may cost next to nothing."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
"""Bounds for the time of one token."""


class Histogram:
    """How many values were at most each of ``bounds``, which ascend, and their ``sum``."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """Of all values."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Each bound, "+Inf" behind them, and how many values are not above it."""
        bounds = [str(float(bound)) for bound in self._bounds]
        return zip([*bounds, "+Inf"], accumulate(self._counts), strict=True)
