"""What the README and the quickstart show works as printed, and what pages point at exists."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.docs.blocks import RUN, SHOWN, Block, blocks
from tests.servers import ROOT, Server, free_port

README = ROOT / "README.md"
RUN_PAGES = [README, ROOT / "docs" / "quickstart.md"]
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demo" / "README.md"]
BLOCKS = [block for page in RUN_PAGES for block in blocks(page)]


# Not that of the `make` that runs the tests, which would pass its own variables on.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}


def of(*said: str) -> list[Block]:
    return [block for block in BLOCKS if block.said in said and block.language in RUN]


def here(code: str) -> str:
    """With paths that exist on this machine."""
    return code.replace("/models/InternVL3-2B", "demo/checkpoint/chat").replace(
        ".venv/bin/", f"{Path(sys.executable).parent}/"
    )


def command(block: Block) -> list[str]:
    shell = ["bash", "-euo", "pipefail", "-c"]
    return [*(shell if block.language == "bash" else [sys.executable, "-c"]), here(block.code)]


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        assert block.language in RUN + SHOWN, block
        if block.language in RUN:
            assert block.said in ("prints", "serves", "not run"), block
            assert bool(block.text) == (block.said != "serves"), block


def test_what_is_not_run_is_known_by_name() -> None:
    assert [(block.page, block.text) for block in of("not run")] == [
        ("README.md", "these very tests"),
        ("docs/quickstart.md", "download of a model"),
        ("docs/quickstart.md", "Docker"),
    ]


@pytest.mark.parametrize("block", of("prints"), ids=str)
def test_a_block_prints_what_its_page_says(block: Block, demo_server: Server) -> None:
    arguments = [each.replace("http://127.0.0.1:8000", demo_server.url) for each in command(block)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=True, text=True)
    assert block.text in done.stdout


class Started(Server):
    """What a block starts, on another port than it says."""

    def __init__(self, block: Block, log: Path) -> None:
        self.port = free_port()
        self.url, self.trust, self.log = f"http://127.0.0.1:{self.port}", True, log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command(block),
                cwd=ROOT,
                env=_ENVIRONMENT | {"INTERNVL_PORT": str(self.port)},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            self.wait_for_status("/ready", 200)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As Ctrl-C does in a terminal."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(120)


@pytest.mark.parametrize("block", {block.code: block for block in of("serves")}.values(), ids=str)
def test_a_block_that_serves_starts_a_server(block: Block, tmp_path: Path) -> None:
    if block.code.startswith("make"):
        current = subprocess.run(
            ["make", "-q", ".venv/.runtime"], cwd=ROOT, env=_ENVIRONMENT, check=False
        )
        if current.returncode and not os.environ.get("CI"):
            pytest.skip("make would install packages first")
    server = Started(block, tmp_path / "log")
    try:
        key = re.match("INTERNVL_API_KEY=(.+?) ", block.code)
        headers = {"Authorization": f"Bearer {key[1]}"} if key else {}
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == (401 if key else 200)
    finally:
        server.close()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*RUN_PAGES, ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        named = {a or b for a, b in re.findall(r"`make ([a-z]+)|^make ([a-z]+)$", text, re.M)}
        assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
