"""What pages say of the repository is there."""

import re
from pathlib import Path

import pytest

from tests.servers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "server|engine|model|preprocessing|wire|demo|tests|benchmarks|helm|docs"
# Made by whoever follows the page.
NEW = re.compile("NAME|NNNN")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)", text):
        assert NEW.search(path) or (ROOT / path.rstrip(".")).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_function_that_is_named_is_in_its_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.py):(\w+)`", text):
        code = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^ *(async def|def|class) {name}\b", code, re.MULTILINE), (path, name)


def test_every_decision_has_its_parts_and_is_short() -> None:
    decisions = sorted((ROOT / "docs" / "adr").glob("0*.md"))
    listed = (ROOT / "docs" / "adr" / "index.md").read_text(encoding="utf-8")
    for number, page in enumerate(decisions, 1):
        text = page.read_text(encoding="utf-8")
        assert page.name.startswith(f"{number:04}-")
        assert f"({page.name})" in listed
        assert len(text.splitlines()) < 40
        for part in ("## Context", "## Decision", "rejected", "## Consequences"):
            assert part.lower() in text.lower(), (page.name, part)
