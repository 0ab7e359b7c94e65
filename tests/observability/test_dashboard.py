"""Grafana's dashboard: its file is current, its queries are Prometheus' own and ask for what the
server has, and its panels stand beside each other."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.observability.dashboard import FILE, WIDTH, text
from tests.observability.names import check
from tests.observability.queries import QUERIES, filled
from tests.tools import tool

DASHBOARD = json.loads(FILE.read_text())
PANELS = DASHBOARD["panels"]


def test_the_file_is_what_is_written_here() -> None:
    assert FILE.read_text() == text(), "run: python -m tests.observability.dashboard"


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": filled(query)} for number, query in enumerate(QUERIES)
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [tool("promtool"), "check", "rules", "--lint-fatal", file],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_the_server_has_of_the_replicas_that_are_chosen(query: str) -> None:
    check(query)
    assert query.count("{") == query.count('job=~"$job", instance=~"$instance"')


def test_panels_have_their_own_numbers_and_places_and_say_what_they_show() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
        for cell in cells:
            assert cell not in taken, panel["title"]
            taken.add(cell)
        if panel["type"] != "row":
            assert panel["description"].endswith((".", "…"))
            assert panel["fieldConfig"]["defaults"]["unit"]
            names = [target["legendFormat"] for target in panel["targets"]]
            assert len(set(names)) == len(names) > 0
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)


def test_everything_comes_from_the_data_source_that_is_chosen() -> None:
    first, *_ = DASHBOARD["templating"]["list"]
    assert (first["name"], first["type"]) == ("datasource", "datasource")
    sources = {
        found["datasource"]["uid"]
        for panel in PANELS
        if panel["type"] != "row"
        for found in [panel, *panel["targets"]]
    }
    assert sources == {"${datasource}"}
