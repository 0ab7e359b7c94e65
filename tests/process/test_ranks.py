"""A model in several processes: the same tokens, and one life that they share."""

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import ProcessEngine
from engine.ranks import _Slowest
from tests.checkpoints import Shape, make_checkpoint
from tests.process.test_engine_main import request
from tests.servers import free_port
from wire import handshake
from wire.handshake import CHALLENGE, PROOF, Offer
from wire.messages import Fault, Progress
from wire.settings import EngineSettings

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0
SHAPE = Shape(heads=6, kv_heads=6)  # for two or three ranks
TOKENS = 200
SECRET = b"sixteen or more of them"
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ranks") / "model", shape=SHAPE)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[int]:
    """What one process generates."""

    async def run() -> list[int]:
        async with engine(folder, size=1) as client:
            return await tokens(client, "whole")

    return asyncio.run(run())


@contextlib.asynccontextmanager
async def engine(folder: Path, size: int, **settings: Any) -> AsyncIterator[ProcessEngine]:
    values = {"device": "cpu", "num_kv_blocks": 64, "tensor_parallel_size": size} | settings
    client = ProcessEngine(EngineSettings(model=str(folder), **values), stop_timeout=20)
    await client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        yield client
    finally:
        await asyncio.wait_for(client.stop(), DEADLINE)


async def tokens(client: ProcessEngine, name: str, count: int = TOKENS) -> list[int]:
    return [t async for output in client.submit(*request(name, count)) for t in output.token_ids]


async def begun(client: ProcessEngine, name: str) -> "asyncio.Task[list[int]]":
    """A request that is being computed."""
    task = asyncio.create_task(tokens(client, name))
    steps = client.stats.steps
    async with asyncio.timeout(DEADLINE):
        while client.stats.steps < steps + 5:
            await asyncio.sleep(0)
    assert not task.done()
    return task


def ranks(pid: int | None) -> list[int]:
    """The processes that an engine has started, the first rank first."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pidfds: list[int]) -> None:
    """Wait on pidfds, which become readable when their processes have ended, reaped or not."""
    for pidfd in pidfds:
        found = await asyncio.to_thread(select.select, [pidfd], [], [], DEADLINE)
        os.close(pidfd)
        assert found[0], "a process is still there"


async def test_ranks_generate_what_one_process_does_and_die_and_rise_together(
    folder: Path, whole: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    async with engine(folder, size=3, async_scheduling="on") as client:
        assert await tokens(client, "equal") == whole
        stream = await begun(client, "killed")
        first, _ = ranks(client.pid)
        pidfds = [os.pidfd_open(pid) for pid in (client.pid or 0, *ranks(client.pid))]
        os.kill(first, signal.SIGKILL)
        await gone(pidfds)
        assert await asyncio.wait_for(stream, DEADLINE) == whole
        assert client.faults["exit"] == client.restarts == 1
        assert "rank 1: it ended with signal 9" in capfd.readouterr().err
        pidfds = [os.pidfd_open(pid) for pid in ranks(client.pid)]
    await gone(pidfds)


async def test_a_rank_that_is_stopped_ends_with_its_engine(folder: Path, whole: list[int]) -> None:
    async with engine(folder, size=2, async_scheduling="off") as client:
        stream = await begun(client, "stopped")
        pids = [client.pid or 0, *ranks(client.pid)]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGKILL)
        await gone(pidfds)
        assert await asyncio.wait_for(stream, DEADLINE) == whole
        assert client.faults["exit"] == client.restarts == 1


async def test_steps_are_timed_profiled_and_logged_with_ranks(
    folder: Path, whole: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    async with engine(folder, size=2, step_budget_ms=50) as client:
        stream = await begun(client, "watched")
        assert b"function calls" in await asyncio.wait_for(client.profile(0.1), DEADLINE)
        assert await stream == whole
        assert client.stats.predicted_seconds > 0  # the cost model was fitted
        client.set_log_level("debug")
        await tokens(client, "logged", 2)
        client.set_log_level("error")
        await tokens(client, "silent", 2)
    said = [line for line in capfd.readouterr().err.splitlines() if " rank1 " in line]
    assert any("DEBUG" in line for line in said)
    assert not any("leaving" in line for line in said)


async def test_a_model_that_cannot_be_loaded_fails_the_start_with_a_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = ProcessEngine(EngineSettings(model=str(tmp_path), tensor_parallel_size=2))
    await client.start()
    try:
        with pytest.raises(Exception, match="could not be started"):
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert (client.failure or "").startswith("load: CheckpointError: ")
        assert "Traceback" not in capfd.readouterr().err
    finally:
        await client.stop()


def test_the_front_end_is_told_of_the_rank_that_is_behind() -> None:
    told: list[Progress | Fault] = []
    slowest = _Slowest(told.append)
    for rank, progress, expected in (
        (0, Progress("config"), Progress("config")),
        (0, Progress("weights", 50, 100), Progress("weights", 50, 100)),
        (1, Progress("config"), Progress("config")),
        (1, Progress("weights", 10, 100), Progress("weights", 10, 100)),
        (1, Progress("weights", 80, 100), Progress("weights", 50, 100)),
        (0, Progress("cache"), Progress("weights", 80, 100)),
    ):
        slowest.hear(rank, progress)
        assert told[-1] == expected


async def test_more_stages_than_layers_fail_the_start_with_the_numbers(folder: Path) -> None:
    client = ProcessEngine(EngineSettings(model=str(folder), pipeline_parallel_size=3))
    await client.start()
    try:
        with pytest.raises(Exception, match="could not be started"):
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        told = "load: SettingError: pipeline_parallel_size 3 is more than the model's 2 layers"
        assert (client.failure or "").startswith(told)
    finally:
        await client.stop()


def settings_of_hosts(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    (tmp_path / "secret").write_bytes(SECRET)
    return {
        "nodes": 2,
        "rank_host": "127.0.0.1",
        "rank_port": free_port(),
        "rank_secret_file": str(tmp_path / "secret"),
    } | settings


def start_node(values: dict[str, Any], *words: str) -> "subprocess.Popen[bytes]":
    """`internvl rank` as a launcher starts it."""
    variables = {
        "LWS_LEADER_ADDRESS": "127.0.0.1",
        "LWS_GROUP_SIZE": "2",
        "LWS_WORKER_INDEX": "1",
        "INTERNVL_RANK_PORT": str(values["rank_port"]),
        "INTERNVL_RANK_SECRET_FILE": values["rank_secret_file"],
        "INTERNVL_TENSOR_PARALLEL_SIZE": "2",
    }
    command = [sys.executable, "-m", "server", "rank", *words]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables})


async def test_a_rank_of_another_host_that_cannot_load_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_checkpoint(tmp_path / "another", shape=SHAPE, seed=1)
    (other / "more.safetensors").touch()
    values = settings_of_hosts(tmp_path)
    node = start_node(values, "--model", str(other))
    try:
        with pytest.raises(Exception, match="could not be started"):
            async with engine(folder, size=2, **values):
                pass
        told = f"load: rank 1: Unservable: the checkpoint of rank 0 is not in {other} on this host"
        assert told in caplog.text
    finally:
        node.terminate()
        assert node.wait(DEADLINE) == 0


async def test_a_rank_that_breaks_its_word_ends_the_engine(folder: Path, tmp_path: Path) -> None:
    values = settings_of_hosts(tmp_path, rank_timeout=60)

    def come() -> bytes:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                sock = socket.create_connection(("127.0.0.1", values["rank_port"]), DEADLINE)
                break
        with sock:
            challenged = sock.recv(CHALLENGE, socket.MSG_WAITALL)
            sock.sendall(handshake.call(SECRET, Offer(1, 0, 1, handshake.version()), challenged))
            sock.recv(PROOF, socket.MSG_WAITALL)
            sock.recv(1)  # it has begun to be told what it is
            sock.sendall(struct.pack("<II", 1 << 20, 0))  # a message of a megabyte
            while said := sock.recv(1 << 16):
                last = said
            return last

    false = threading.Thread(target=come, daemon=True)
    false.start()
    client = ProcessEngine(EngineSettings(model=str(folder), tensor_parallel_size=2, **values))
    await client.start()
    try:
        with pytest.raises(Exception, match="could not be started"):
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert client.failure == "exit: rank 1: the connection to its host is lost"
    finally:
        await client.stop()
        false.join(DEADLINE)


def test_two_hosts_generate_what_one_does_and_find_each_other_again(
    folder: Path, whole: list[int], tmp_path: Path
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs the program unshare")
    if subprocess.run([*NAMESPACES, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this kernel, or the container, allows no namespaces")
    (tmp_path / "secret").write_bytes(SECRET)
    program = [sys.executable, "-m", "tests.process.two_hosts", str(folder), str(tmp_path)]
    done = subprocess.run(
        [*NAMESPACES, *program, str(TOKENS)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=400,
        check=True,
    )
    report = json.loads(done.stdout)
    if "impossible" in report:
        pytest.skip(f"no network can be made here: {report['impossible']}")
    assert report == {
        "both hosts": whole,
        "after the death of the rank": whole,
        "after the death of the engine": whole,
        "restarts": 2,
        "processes left": 0,
        "status": 0,
    }
