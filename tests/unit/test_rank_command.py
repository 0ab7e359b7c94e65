"""What `internvl rank` makes of its flags and of what launchers set, and what it refuses."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.node import Host
from server.cli import main
from server.commands.rank import host_of_ranks
from wire.settings import SettingError

LWS = {"LWS_LEADER_ADDRESS": "eyes-0.eyes.ns", "LWS_GROUP_SIZE": "3", "LWS_WORKER_INDEX": "2"}
TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "3", "RANK": "1"}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "secret").write_bytes(bytes(range(97, 117)))
    return {"tensor_parallel_size": "6", "rank_secret_file": str(tmp_path / "secret")}


def host(given: dict[str, str], env: dict[str, str]) -> Host:
    return msgspec.convert(host_of_ranks(dict(given), env), Host)


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ({"leader": "a", "node": "1", "nodes": "2"}, {}, ("a", 29500, 1, 3)),
        ({"leader": "a:5", "node": "1", "nodes": "2"}, {}, ("a", 5, 1, 3)),
        ({"leader": "[fd00::1]", "node": "5", "nodes": "6"}, {}, ("fd00::1", 29500, 5, 1)),
        ({"leader": "[fd00::1]:7", "node": "5", "nodes": "6"}, {}, ("fd00::1", 7, 5, 1)),
        ({}, LWS, ("eyes-0.eyes.ns", 29500, 2, 2)),
        ({"rank_port": "6"}, LWS, ("eyes-0.eyes.ns", 6, 2, 2)),
        ({}, TORCH, ("10.0.0.1", 1234, 1, 2)),
        ({}, TORCH | LWS, ("eyes-0.eyes.ns", 29500, 2, 2)),
        ({"leader": "a", "node": "1", "nodes": "2"}, TORCH | LWS, ("a", 29500, 1, 3)),
        ({}, LWS | {"INTERNVL_NODES": "6"}, ("eyes-0.eyes.ns", 29500, 2, 1)),
        ({"pipeline_parallel_size": "4"}, LWS, ("eyes-0.eyes.ns", 29500, 2, 8)),
    ],
)
def test_flags_go_before_what_launchers_set(
    given: dict[str, str], flags: dict[str, str], env: dict[str, str], expected: Any
) -> None:
    found = host(given | flags, env)
    assert (found.leader, found.port, found.node, found.processes) == expected
    assert found.model == ""


@pytest.mark.parametrize(
    ("flags", "env", "why"),
    [
        ({"node": "1", "nodes": "2"}, {}, "--leader"),
        ({"leader": "a:b:c", "node": "1", "nodes": "2"}, {}, "--leader"),
        ({"leader": "a..b", "node": "1", "nodes": "2"}, {}, "--leader: 'a..b'"),
        ({"leader": "a:70000", "node": "1", "nodes": "2"}, {}, "port"),
        ({"leader": "a", "nodes": "2"}, {}, "--node"),
        ({"leader": "a", "node": "one", "nodes": "2"}, {}, "--node"),
        ({"leader": "a", "node": "0", "nodes": "2"}, {}, "--node"),
        ({"leader": "a", "node": "2", "nodes": "2"}, {}, "--node"),
        ({"leader": "a", "node": "1"}, {}, "--nodes"),
        ({"leader": "a", "node": "1", "nodes": "4"}, {}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": "2"}, LWS | {"LWS_GROUP_SIZE": "8"}, "6 x 2 processes cannot"),
        ({"pipeline_parallel_size": "11"}, LWS, "6 x 11 processes are more than 64"),
        ({"leader": "a", "node": "1", "nodes": "2", "rank_secret_file": ""}, {}, "must be given"),
        ({"leader": "a", "node": "1", "nodes": "2", "model": "/nowhere"}, {}, "--model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    given: dict[str, str], flags: dict[str, str], env: dict[str, str], why: str
) -> None:
    with pytest.raises(SettingError, match=why):
        host(given | flags, env)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "--node", "1"]) == 2
    assert capsys.readouterr().err.startswith("internvl rank: --leader")
