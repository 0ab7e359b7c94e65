"""Charts and tables of what was measured, and their place in the documentation.

    python -m benchmarks.charts benchmarks/results/compare.json [...]

Takes results of ``benchmarks.compare`` and ``benchmarks.ladder``; writes charts as SVG to
docs/charts, and tables and links into docs/performance.md, between the lines that mark the place of
a ladder, or of a comparison with that peer. A chart of a comparison with vLLM has in each case a
bar per server, as long as the median, a line from the least to the greatest round, the figure, and
behind a peer's bar the ratio of ours to it. The longest of a case fills the width. That of a ladder
has a bar per rung. Colours follow the reader's light or dark scheme.
"""

import argparse
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.table import (
    LADDER,
    OURS,
    THROUGHPUT,
    TTFT,
    Metric,
    Results,
    brief,
    ladder,
    marks,
    report,
)

CHARTS = {
    "throughput.svg": ("Tokens written per second", THROUGHPUT),
    "latency.svg": ("Time to the first token", TTFT),
}
BEGIN, END = "<!-- benchmarks.charts: {} -->", "<!-- end of {} -->"
WIDTH, LEFT, TOP, LONGEST = 760, 190, 84, 390
BAR, GAP = 18, 14
COLOURS = ("ours", "first", "second", "third")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.page { fill: #ffffff } .axis { stroke: #818b98 } .spread { stroke: #1f2328 }
.ours { fill: #218bff } .first { fill: #d4a72c } .second { fill: #a475f9 }
.third { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  .page { fill: #0d1117 } .axis { stroke: #656c76 } .spread { stroke: #f0f6fc }
  .ours { fill: #1f6feb } .first { fill: #9e6a03 } .second { fill: #8957e5 }
  .third { fill: #6e7681 }
}
"""


def chart(results: Results, title: str, metric: Metric) -> str:
    """The SVG of a metric in all cases that have it."""
    cases = [
        case
        for case in results.titles
        if any(results.figure(server, case, metric) for server in results.servers)
    ]
    step = BAR * len(results.servers) + GAP
    bottom = TOP + step * len(cases)
    better = "more is better" if metric.higher_is_better else "less is better"
    parts = [
        *_head(WIDTH, bottom, f"{title}, {metric.unit}"),
        _text(
            16,
            44,
            f"{better}; bar: median of the rounds, line: least to greatest, "
            f"the longest of each case fills the width; × is ours to the peer",
            "small",
        ),
        _text(16, 66, _where(results.found), "small"),
        *_legend(results.servers),
    ]
    for index, case in enumerate(cases):
        top = TOP + step * index
        parts.append(_text(LEFT - 10, top + (step - GAP) / 2 + 4, results.titles[case], "case"))
        parts += _bars(results, case, metric, top)
    parts.append(f'<path class="axis" d="M{LEFT} {TOP - 4}V{bottom - GAP + 4}"/>')
    return "\n".join([*parts, "</svg>\n"])


def _bars(results: Results, case: str, metric: Metric, top: float) -> Iterator[str]:
    spreads = [results.figure(server, case, metric) for server in results.servers]
    scale = LONGEST / (max(spread.greatest for spread in spreads if spread) or 1)
    for index, (server, spread) in enumerate(zip(results.servers, spreads, strict=True)):
        y = top + BAR * index
        if spread is None:
            yield _text(LEFT + 6, y + 13, "–", "small")
            continue
        length = spread.median * scale
        yield (
            f'<rect class="{COLOURS[index % len(COLOURS)]}" x="{LEFT}" y="{y + 1}" '
            f'width="{length:.1f}" height="{BAR - 2}"/>'
        )
        least, greatest = LEFT + spread.least * scale, LEFT + spread.greatest * scale
        yield f'<path class="spread" d="M{least:.1f} {y + BAR / 2}H{greatest:.1f}"/>'
        ratio = results.ratio(server, case, metric) if server in results.peers else None
        said = spread.short if ratio is None else f"{spread.short}  (×{ratio.short})"
        yield _text(greatest + 6, y + 13, said)


def _head(width: int, height: int, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        _text(16, 26, title, "title"),
    ]


def _where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores; {found['commit']}, {found['date']}"


def _legend(servers: list[str]) -> Iterator[str]:
    right = WIDTH - 16
    for index, server in reversed(list(enumerate(servers))):
        right -= 8 * len(server) + 26
        colour = COLOURS[index % len(COLOURS)]
        yield f'<rect class="{colour}" x="{right}" y="14" width="12" height="12"/>'
        yield _text(right + 18, 25, server)


def _text(x: float, y: float, said: str, kind: str = "") -> str:
    anchor = ' text-anchor="end"' if kind == "case" else ""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}{anchor}>{html.escape(said)}</text>'


def steps(found: dict[str, Any]) -> str:
    """The SVG of a ladder: a column per figure, a bar per rung, the longest fills the column."""
    results, metrics = Results(found), LADDER[:4]  # every rung has these
    left, width = 300, 160
    bottom = TOP + BAR * len(found["cases"]) + GAP
    title = "What each step brings, milliseconds"
    said = "each rung has one thing more; bar: median of the rounds; " + _where(found)
    parts = [*_head(left + width * len(metrics), bottom, title), _text(16, 44, said, "small")]
    for index, title in enumerate(found["cases"].values()):
        parts.append(_text(left - 10, TOP + BAR * index + 13, title, "case"))
    for column, metric in enumerate(metrics):
        x = left + width * column
        parts.append(_text(x, TOP - 10, metric.title, "small"))
        spreads = [results.figure(OURS, rung, metric) for rung in found["cases"]]
        longest = max(spread.median for spread in spreads if spread)
        for index, spread in enumerate(spreads):
            if spread is not None:
                y, length = TOP + BAR * index, spread.median / longest * (width - 70)
                parts.append(
                    f'<rect class="ours" x="{x}" y="{y + 1}" width="{length:.1f}" '
                    f'height="{BAR - 2}"/>'
                )
                parts.append(_text(x + length + 5, y + 13, spread.short))
    return "\n".join([*parts, "</svg>\n"])


def insert(page: str, place: str, text: str) -> str:
    """A page with ``text`` between the lines that mark a place.

    Raises ValueError where they are missing.
    """
    first, last = BEGIN.format(place), END.format(place)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not end:
        raise ValueError(f"the page has no place between {first} and {last}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def shown(found: dict[str, Any]) -> tuple[str, str, dict[str, tuple[str, str]]]:
    """Where a result belongs, its tables, and by their files the titles and SVGs of its charts.

    Raises ValueError for a comparison with nobody.
    """
    results = Results(found)
    if not results.peers:
        if not any(LADDER[0].key in record for record in results.records):
            raise ValueError("it is neither a ladder nor a comparison with a peer")
        return "ladder", ladder(found), {"ladder.svg": ("What each step brings", steps(found))}
    peer = results.peers[0]
    if not marks(peer):
        return peer, brief(found), {}
    charts = {
        name: (title, chart(results, title, metric)) for name, (title, metric) in CHARTS.items()
    }
    return peer, report(found), charts


def main() -> None:
    """Write the charts and tables of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    given = parser.parse_args()
    page = given.docs / "performance.md"
    (given.docs / "charts").mkdir(exist_ok=True)
    for file in given.files:
        place, text, charts = shown(json.loads(file.read_text(encoding="utf-8")))
        for name, (title, svg) in charts.items():
            (given.docs / "charts" / name).write_text(svg, encoding="utf-8")
            text += f"\n\n![{title}](charts/{name})"
        page.write_text(insert(page.read_text(encoding="utf-8"), place, text), encoding="utf-8")


if __name__ == "__main__":
    main()
