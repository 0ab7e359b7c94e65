"""What a query asks for, held against the server's own table of metrics."""

import re

from server.metric_table import TABLE

# What Prometheus itself adds.
SCRAPED = {"job", "instance"}
_SERIES = re.compile(r"\b((?:internvl|process)_\w+|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_PARTS = ("_bucket", "_sum", "_count")


def check(query: str) -> None:
    """Every metric of ``query`` is one of the server's, with labels and values that it has."""
    labels = set(SCRAPED)
    found = _SERIES.findall(query)
    assert found, query
    for name, matchers in found:
        if name == "up":
            continue
        base = name
        for part in _PARTS:
            if name.removesuffix(part) in TABLE:
                base = name.removesuffix(part)
        row = TABLE[base]
        assert (base != name) == (row.kind == "histogram"), f"{name} is a {row.kind}"
        own = {*row.labels, *SCRAPED} | ({"le"} if name.endswith("_bucket") else set())
        labels |= own
        for label, how, value in _MATCHER.findall(matchers):
            assert label in own, f"{name} has no {label}"
            if row.values and label in row.labels and "$" not in value:
                known = value.split("|") if "~" in how else [value]
                assert set(known) <= set(row.values), f"{label} of {name} is never {value}"
    for group in re.findall(r"\b(?:by|on) ?\(([^)]*)\)", query):
        assert {label.strip() for label in group.split(",")} <= labels, query
