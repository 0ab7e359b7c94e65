"""What ``benchmarks.compare`` and ``benchmarks.bench`` measured, as Markdown tables.

    python -m benchmarks.table benchmarks/results/compare.json

A figure is the median of the rounds, followed by the least and the greatest. A ratio is that of the
medians, followed by the least and the greatest of the rounds' own.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from server.bench.client import limit

OURS = "ours"
DEFAULT, TUNED = "vllm-default", "vllm-tuned"
"""vLLM on a GPU, as ``benchmarks.gpu.beside`` starts it."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure in a record and how it is shown."""

    key: str
    title: str
    unit: str
    higher_is_better: bool = False


THROUGHPUT = Metric("tokens_per_s", "output", "tokens/s", True)
REQUESTS = Metric("requests_per_s", "requests", "1/s", True)
TTFT = Metric("ttft_p50_ms", "first token", "ms")
PER_TOKEN = Metric("tpot_p50_ms", "per token", "ms")
OTHERS = Metric("others", "machine used by others", "%")
START = Metric("ready_s", "start to ready", "s")
MEMORY = Metric("rss_gib", "memory when ready", "GiB")
METRICS = (
    THROUGHPUT,
    REQUESTS,
    TTFT,
    PER_TOKEN,
    Metric("itl_p50_ms", "between pieces, p50", "ms"),
    Metric("itl_p99_ms", "p99", "ms"),
    Metric("server_cpu_s", "processor", "s"),
    OTHERS,
)

# What benchmarks.ladder measures.
LADDER = (
    Metric("step_1_ms", "step of 1 row", "ms"),
    Metric("step_16_ms", "of 16 rows", "ms"),
    Metric("tile_ms", "tile through the encoder", "ms"),
    Metric("picture_ms", "first token of a 448² picture", "ms"),
    Metric("again_ms", "of the same again", "ms"),
    Metric("pause_ms", "longest pause of a stream while four pictures come", "ms"),
)


@dataclasses.dataclass(frozen=True)
class Mark:
    """What ours divided by the peer's has to reach; at most ``value`` where less is better.

    Without a ``peer`` it is set against all that are not ``UNMARKED``.
    """

    case: str
    metric: Metric
    value: float
    peer: str = ""

    def applies(self, peer: str) -> bool:
        return peer == self.peer if self.peer else peer not in UNMARKED

    def reached(self, ratio: float) -> bool:
        return ratio >= self.value if self.metric.higher_is_better else ratio <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.metric.higher_is_better else '≤'} {self.value:g}"


MARKS = (
    Mark("text-c1", THROUGHPUT, 2.0),
    Mark("text-c4", THROUGHPUT, 1.6),
    Mark("text-c16", THROUGHPUT, 1.6),
    Mark("picture-c1", REQUESTS, 1.8),
    Mark("picture-c1", TTFT, 0.55),
    Mark("picture-c4", REQUESTS, 1.8),
    Mark("picture-c4", TTFT, 0.55),
    Mark("picture-896", TTFT, 0.55),
    Mark("again", TTFT, 0.5),
    Mark("prefix", TTFT, 0.6),
    Mark("start", START, 0.25),
    Mark("start", MEMORY, 0.8),
    *(
        Mark(f"8B-text-c{rows}", THROUGHPUT, 1.0, peer)
        for rows in (1, 16, 64)
        for peer in (DEFAULT, TUNED)
    ),
    Mark("8B-12mp-c16", REQUESTS, 1.5, DEFAULT),
    Mark("8B-12mp-c16", REQUESTS, 1.05, TUNED),
    Mark("1B-12mp-c16", REQUESTS, 3.0, DEFAULT),
)
"""Against vLLM on a CPU, and on a GPU in two settings."""
UNMARKED = ("transformers", "zentorch", DEFAULT, TUNED)
"""Peers that other marks are set against, or none."""


def marks(peer: str) -> bool:
    """Whether any marks are set against this peer."""
    return any(mark.applies(peer) for mark in MARKS)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    @property
    def short(self) -> str:
        """The median alone."""
        return _short(self.median)

    def __str__(self) -> str:
        if self.least == self.greatest:
            return self.short
        return f"{self.short} ({_short(self.least)}–{_short(self.greatest)})"


class Results:
    """The records of one run: ``server``, ``case``, ``round`` and figures in each."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.records: list[dict[str, Any]] = found["records"]
        self.titles: dict[str, str] = found["cases"] | {"start": "start"}
        self.servers = list(dict.fromkeys(record["server"] for record in self.records))
        self.peers = [name for name in self.servers if name != OURS] if OURS in self.servers else []

    def rounds(self, server: str, case: str, metric: Metric) -> dict[int, float]:
        """The figure of each round; none where it was not measured or the case failed."""
        return {
            record["round"]: record[metric.key]
            for record in self.records
            if (record["server"], record["case"]) == (server, case)
            and record.get(metric.key) is not None
        }

    def figure(self, server: str, case: str, metric: Metric) -> Spread | None:
        values = self.rounds(server, case, metric).values()
        return Spread.of(list(values)) if values else None

    def ratio(self, peer: str, case: str, metric: Metric) -> Spread | None:
        """Ours divided by the peer's; None where one of them is missing."""
        ours, theirs = (self.rounds(server, case, metric) for server in (OURS, peer))
        if not ours or not any(theirs.values()):
            return None
        medians = statistics.median(ours.values()) / statistics.median(theirs.values())
        pairs = [ours[index] / theirs[index] for index in ours if theirs.get(index)] or [medians]
        return Spread(medians, min(pairs), max(pairs))


def against(results: Results, peer: str) -> str:
    """Ours beside a peer in the cases that have a mark."""
    set_here = {(mark.case, mark.metric): mark for mark in MARKS if mark.applies(peer)}
    rows = []
    for case, metric in dict.fromkeys((mark.case, mark.metric) for mark in MARKS):
        if case not in results.titles:
            continue
        ours, theirs = (results.figure(server, case, metric) for server in (OURS, peer))
        ratio = results.ratio(peer, case, metric)
        mark = set_here.get((case, metric))
        verdict = "–"
        if mark is not None and ratio is not None:
            verdict = "yes" if mark.reached(ratio.median) else "**no**"
        title = metric.title if case == "start" else results.titles[case]
        what = "" if case == "start" else f"{metric.title}, "
        row: list[object] = [
            title,
            f"{what}{metric.unit}",
            _said(ours),
            _said(theirs),
            _said(ratio),
        ]
        rows.append([*row, *([mark or "–", verdict] if marks(peer) else [])])
    heads = ["case", "figure", OURS, peer, "ratio", *(["mark", "reached"] if marks(peer) else [])]
    return _markdown(heads, rows)


def figures(results: Results, metrics: Sequence[Metric] = METRICS) -> str:
    """Figures of all servers."""
    rows = [
        [title, server, *(_said(results.figure(server, case, metric)) for metric in metrics)]
        for case, title in results.titles.items()
        for server in results.servers
        if case != "start"
    ]
    names = [f"{metric.title}, {metric.unit}" for metric in metrics]
    start = [
        [server, *(_said(results.figure(server, "start", metric)) for metric in (START, MEMORY))]
        for server in results.servers
    ]
    heads = [f"{metric.title}, {metric.unit}" for metric in (START, MEMORY)]
    return (
        f"{_markdown(['case', 'server', *names], rows)}\n\n{_markdown(['server', *heads], start)}"
    )


def ladder(found: dict[str, Any]) -> str:
    """The rungs of ``benchmarks.ladder``."""
    results = Results(found)
    rows = [
        [title, *(_said(results.figure(OURS, case, metric)) for metric in LADDER)]
        for case, title in found["cases"].items()
    ]
    heads = [f"{metric.title}, {metric.unit}" for metric in LADDER]
    return f"{conditions(found)}\n\n{_markdown(['each rung has one thing more', *heads], rows)}"


def conditions(found: dict[str, Any]) -> str:
    """When, where and how it was measured."""
    machine = found["machine"]
    return (
        f"Commit {found['commit']}, {found['date']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {' '.join([*machine['flags'], *machine.get('gpu', [])])}; "
        f"client: {found['client']}; "
        f"`{found['command']}`"
    )


def notes(results: Results) -> Iterator[str]:
    """The conditions, and what makes figures doubtful."""
    yield conditions(results.found)
    for record in results.records:
        if "error" in record:
            yield f"{record['server']} failed {record['case']}: {record['error']}"
    for case in results.titles:
        mine = [record for record in results.records if record["case"] == case]
        for key, what in (("prompt_tokens", "were sent"), ("output_tokens", "wrote")):
            tokens = {record["server"]: record[key] for record in mine if key in record}
            if results.peers and len(set(tokens.values())) > 1:
                yield f"{case}: the servers {what} different numbers of tokens: {tokens}"
        busy = max((record.get("client_busy", 0.0) for record in mine), default=0.0)
        if said := limit(busy):
            yield f"{case}: {said}"


def brief(found: dict[str, Any]) -> str:
    """The conditions, and ours beside the peers."""
    results = Results(found)
    parts = ["\n".join(notes(results)), *(against(results, peer) for peer in results.peers)]
    return "\n\n".join(parts)


def report(found: dict[str, Any]) -> str:
    """The same, and all figures."""
    return f"{brief(found)}\n\n{figures(Results(found))}"


def aligned(text: str) -> str:
    """Markdown whose tables stand in columns, as a terminal should show them."""
    lines = text.splitlines()
    for is_table, group in itertools.groupby(range(len(lines)), lambda at: lines[at][:1] == "|"):
        if is_table:
            places = list(group)
            rows = [[cell.strip() for cell in lines[at].split("|")[1:-1]] for at in places]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for at, row in zip(places, rows, strict=True):
                fill = "-" if row[0] == "---" else " "
                cells = [cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True)]
                lines[at] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


def _said(value: Spread | None) -> str:
    return "–" if value is None else str(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    print(aligned(report(json.loads(parser.parse_args().file.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
