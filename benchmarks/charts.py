"""Bar charts of what ``benchmarks.compare`` measured, as SVG, and their place in the documentation.

    python -m benchmarks.charts benchmarks/results/compare.json

Writes throughput.svg and latency.svg to docs/charts, and the tables and links to the charts into
docs/performance.md, between the lines that mark their place. A chart has in each case a bar per
server, as long as the median, a line from the least to the greatest round, the figure, and behind a
peer's bar the ratio of ours to it. The longest of a case fills the width. Colours follow the
reader's light or dark scheme.
"""

import argparse
import html
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import THROUGHPUT, TTFT, Metric, Results, report

CHARTS = {
    "throughput.svg": ("Tokens written per second", THROUGHPUT),
    "latency.svg": ("Time to the first token", TTFT),
}
BEGIN, END = "<!-- benchmarks.charts -->", "<!-- end of benchmarks.charts -->"
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
    found = results.found
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{bottom}"/>',
        _text(16, 26, f"{title}, {metric.unit}", "title"),
        _text(
            16,
            44,
            f"{better}; bar: median of the rounds, line: least to greatest, "
            f"the longest of each case fills the width; × is ours to the peer",
            "small",
        ),
        _text(
            16,
            66,
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores; "
            f"{found['commit']}, {found['date']}",
            "small",
        ),
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


def insert(page: str, text: str) -> str:
    """A page with ``text`` between the lines that mark its place.

    Raises ValueError where they are missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no place between {BEGIN} and {END}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    """Write the charts and tables of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    given = parser.parse_args()
    found = json.loads(given.file.read_text(encoding="utf-8"))
    folder = given.docs / "charts"
    folder.mkdir(exist_ok=True)
    links = []
    for name, (title, metric) in CHARTS.items():
        (folder / name).write_text(chart(Results(found), title, metric), encoding="utf-8")
        links.append(f"![{title}](charts/{name})")
    page = given.docs / "performance.md"
    text = "\n\n".join([report(found), *links])
    page.write_text(insert(page.read_text(encoding="utf-8"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
