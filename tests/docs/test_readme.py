"""What the README shows works as printed, and what it points at exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, Server

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demo" / "README.md"]


def block(language: str, server: Server, number: int = 0) -> str:
    """A README block of a language, aimed at the test's server."""
    text = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[number]
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", server.url)


def test_the_curl_line_answers_about_the_picture(demo_server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", block("bash", demo_server)], cwd=ROOT, capture_output=True, check=True
    )
    answer = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert "red" in answer
    assert "circle" in answer


def test_the_answer_to_the_second_curl_line_keeps_to_its_schema(demo_server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", block("bash", demo_server, 1)], cwd=ROOT, capture_output=True, check=True
    )
    answer = json.loads(json.loads(done.stdout)["choices"][0]["message"]["content"])
    assert answer["color"] in ("red", "green")
    assert answer["number"] <= 9


def test_the_third_curl_line_tells_what_a_picture_costs(demo_server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", block("bash", demo_server, 2)], cwd=ROOT, capture_output=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["fits"] is True
    assert told["parts"][0]["tiles"] >= 1


def test_the_sdk_example_answers_about_the_picture(demo_server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("python", demo_server)],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert "red" in done.stdout
    assert "circle" in done.stdout


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        named = {a or b for a, b in re.findall(r"`make ([a-z]+)|^make ([a-z]+)$", page, re.M)}
        assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
