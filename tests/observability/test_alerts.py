"""The alert rules: each fires when it should and not otherwise, asks for what the server has, and
says where it stands what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.observability.names import check
from tests.servers import ROOT
from tests.tools import tool

FILE = ROOT / "helm/files/alerts.yaml"
CASES = Path(__file__).with_name("alerts_test.yaml")
DOCS = ROOT / "docs/observability.md"
(GROUP,) = yaml.safe_load(FILE.read_text())["groups"]
RULES: list[dict[str, Any]] = GROUP["rules"]


def promtool(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [tool("promtool"), *arguments], cwd=cwd, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_rules() -> None:
    promtool("check", "rules", str(FILE), cwd=ROOT)


def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    # promtool compares the texts too; they have no part in whether an alert fires.
    silent = [{key: rule[key] for key in rule if key != "annotations"} for rule in RULES]
    rules = {"groups": [GROUP | {"rules": silent}]}
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yaml").write_text(CASES.read_text())
    promtool("test", "rules", "cases.yaml", cwd=tmp_path)


def test_there_are_both_cases_for_each_alert() -> None:
    told = [
        (case["alertname"], bool(case.get("exp_alerts")))
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert set(told) == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_the_server_has_and_says_what_to_do(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    told = rule["annotations"]
    assert told.keys() == {"summary", "description", "runbook"}
    page, _, anchor = told["runbook"].partition("#")
    assert page == "docs/observability.md"
    headings = re.findall(r"^#+ (.+)$", DOCS.read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
