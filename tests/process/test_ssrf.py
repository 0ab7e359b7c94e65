"""In a network with a metadata service, neighbours and names that change what they mean, a fetch
reaches strangers on the public internet and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process.private_network import PRIVATE, PUBLIC

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of every attempt, see private_network."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel, or the container, allows no namespaces")
    program = [sys.executable, "-m", "tests.process.private_network"]
    folder = tmp_path_factory.mktemp("private-network")
    done = subprocess.run(
        [*UNSHARE, *program, str(folder)], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    if "impossible" in report:
        pytest.skip(f"no network can be made here: {report['impossible']}")
    return report


def test_public_addresses_are_reached(report: Any) -> None:
    assert set(report["shown"].values()) == {"shown"}
    assert all(report["connections"][address] for address in PUBLIC)


def test_everything_private_is_refused_however_it_is_named(report: Any) -> None:
    assert len(report["refused"]) > 300
    # An IPv6 zone is no valid part of a URL's host.
    wrong = {
        url: code
        for url, code in report["refused"].items()
        if code != ("invalid_media" if "%25lo" in url or "%2525lo" in url else "media_forbidden")
    }
    assert not wrong


def test_no_connection_was_made_to_anything_private(report: Any) -> None:
    assert {address: report["connections"][address] for address in PRIVATE} == dict.fromkeys(
        PRIVATE, 0
    )


def test_without_the_guard_every_private_server_would_have_been_reached(report: Any) -> None:
    assert report["unguarded"] == {address: ["shown", 1] for address in PRIVATE}


def test_a_name_is_asked_for_once_also_when_nobody_listens_there(report: Any) -> None:
    assert report["rebinding.example"] == ["shown", 1]
    assert report["rebinding-silent.example"] == ["media_unreachable", 1]


def test_the_pipeline_stands_behind_the_same_guard(report: Any) -> None:
    assert report["pipeline"] == {
        "cat.png": "shown",
        "to/http://169.254.169.254/": "media_forbidden",
        "to/http://mixed.example/": "media_forbidden",
    }
