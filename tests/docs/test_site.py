"""The pages that ``make docs`` builds."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.servers import ROOT

# What a browser loads by itself when it shows a page; links that a reader clicks are not there.
LOADED = {"src", "srcset", "poster", "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as mkdocs builds them where every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        check=False,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class Loads(HTMLParser):
    """Addresses that a page has the browser load, and texts of its paragraphs."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.paragraphs = [""]
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") != "canonical":
            self.addresses.append(values.get("href", ""))
        self.addresses += [value for name, value in values.items() if name in LOADED]
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "p" in self._open and "code" not in self._open:
            self.paragraphs[-1] += data


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        addresses = Loads(page).addresses
        assert any(address.endswith(".js") for address in addresses)
        assert [each for each in addresses if "//" in each] == [], page
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"""@import|url\(["']?(https?:)?//""", text), style


def test_lists_and_tables_of_the_sources_are_lists_and_tables_of_the_pages(site: Path) -> None:
    for page in site.rglob("*.html"):
        for paragraph in Loads(page).paragraphs:
            assert not re.search(r"^(\s*[-*] |\|)|```", paragraph, re.MULTILINE), page


def test_a_link_out_of_docs_leads_to_a_page_of_the_site(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="repository/CONTRIBUTING.html"' in start
    rules = (site / "repository" / "CONTRIBUTING.html").read_text(encoding="utf-8")
    assert 'href="../architecture.html"' in rules
