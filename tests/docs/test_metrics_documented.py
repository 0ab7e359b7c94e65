"""docs/metrics.md, the table of metrics, and what a server tells are the same."""

import re
import subprocess
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.metric_table import TABLE, page
from tests.servers import Server
from tests.tools import tool

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
PAGES = [PAGE.with_name(name) for name in ("operations.md", "observability.md")]


def scraped(text: str) -> dict[str, str]:
    """Name, as the table has it, and type of each metric of a scrape."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(text)
    }


def test_the_page_is_the_table() -> None:
    current = "\n".join(page())
    assert PAGE.read_text(encoding="utf-8") == current, (
        "write it again: python -m server.metric_table > docs/metrics.md"
    )


def test_a_server_has_the_metrics_of_the_table_and_no_others(demo_server: Server) -> None:
    text = httpx.get(demo_server.url + "/metrics", timeout=60).text
    # The text format knows no type "info".
    kinds = {name: "gauge" if row.kind == "info" else row.kind for name, row in TABLE.items()}
    assert scraped(text) == kinds


def test_prometheus_has_nothing_to_say_about_them(demo_server: Server) -> None:
    page = httpx.get(demo_server.url + "/metrics", timeout=60).content
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=page, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_what_operators_are_told_to_watch_exists() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"`((?:internvl|process)_\w+)`", text))
    assert named >= {"internvl_num_requests_waiting"}
    assert named <= TABLE.keys() | {"internvl_key_"}
