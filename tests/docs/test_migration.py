"""What docs/migration.md says to use here exists."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.routing import Route

from server.admin import Admin
from server.cli import main
from server.metric_table import TABLE
from server.routes import MODULES
from tests.servers import ROOT
from wire.loading import load
from wire.settings import each_setting

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
SETTINGS = {field.name for _, field, *_ in each_setting()}


def ours() -> str:
    """The cells of all tables that say what is here, one a line."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return "\n".join(cell for line in lines for cell in re.split(r" \| ", line)[1:])


def test_every_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rank", "--help"])
    flags = {f"--{name.replace('_', '-')}" for name in SETTINGS}
    flags |= {"--config", *re.findall(r"--[\w-]+", capsys.readouterr().out)}
    example = PAGE.split("internvl serve", 1)[1].split("```", 1)[0]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", ours() + example))
    # What vLLM spells differently is quoted beside.
    named -= {"--no-enable-prefix-caching", "--collect-detailed-traces"}
    assert len(named) > 50
    assert named <= flags


def test_values_that_are_shown_are_taken() -> None:
    shown = [tuple(each.split()) for each in re.findall(r"`(--[a-z][\w-]* [\w./-]+)`", ours())]
    assert len(shown) > 5
    for flag, value in shown:
        load({flag[2:].replace("-", "_"): value}, {})


def test_every_variable_exists() -> None:
    named = re.findall(r"INTERNVL_([A-Z_]*[A-Z])", PAGE)
    assert len(named) > 6
    assert {name.lower() for name in named} <= SETTINGS


def test_every_route_exists() -> None:
    unused: Any = None
    keys: Any = SimpleNamespace(find=None)
    routes = [route for module in MODULES for route in module.router.routes]
    served = {
        f"{method} {route.path}"
        for route in [*routes, *Admin(unused, keys).app.routes]
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    named = re.findall(r"`((?:POST|DELETE|GET) /[^`]+)`", PAGE)
    assert len(named) > 4
    assert set(named) <= served
    for path in re.findall(r"^\| (`/.*?) \| the same \|", PAGE, re.MULTILINE):
        for each in re.findall(r"`(/[^`]+)`", path):
            assert any(route.partition(" ")[2] == each for route in served), each


def test_every_metric_exists() -> None:
    named = set(re.findall(r"`(internvl_\w+)`", PAGE))
    assert len(named) > 20
    assert named <= TABLE.keys()
