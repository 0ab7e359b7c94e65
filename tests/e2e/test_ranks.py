"""A server whose model is in several processes answers as one whose model is in one, whatever is
asked; and when it is gone, so are they."""

import math
import os
import select
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Shape, make_checkpoint
from tests.e2e import test_life as life
from tests.servers import Server

COUNT = 10
KILLED = 5
RANKS = 4
# Two of them have the same key head.
SHAPE = Shape(heads=8, kv_heads=2, mlp=128)
# Fewer blocks than all requests need at once.
FLAGS = ["--device", "cpu", "--num-kv-blocks", "40", "--served-model-name", "internvl-demo"]
DEADLINE = 240.0


def start(folder: Path, log: Path, ranks: int) -> Server:
    return Server(log, ["--model", str(folder), "--tensor-parallel-size", str(ranks), *FLAGS])


def processes(server: Server) -> list[int]:
    """The engine of a server and its ranks."""
    (engine,) = server.children("engine")
    children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
    return [engine, *map(int, children)]


def ask(server: Server, number: int) -> list[Any]:
    """Of each choice: why it ended, its tokens and the likeliest, and their log-probabilities."""
    with server.client() as client:
        answer = client.chat.completions.create(
            model="internvl-demo",
            max_tokens=60,
            logprobs=True,
            top_logprobs=3,
            **life.conversation(number),
        )
    return [
        (
            choice.finish_reason,
            [(entry.bytes, [top.bytes for top in entry.top_logprobs]) for entry in entries],
            [top.logprob for entry in entries for top in entry.top_logprobs],
        )
        for choice in answer.choices
        if choice.logprobs and (entries := choice.logprobs.content or [])
    ]


def ask_all(server: Server) -> list[Any]:
    with ThreadPoolExecutor(COUNT) as pool:
        return list(pool.map(lambda number: ask(server, number), range(COUNT)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ranks") / "model", shape=SHAPE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[list[Any]]:
    """What one process answers."""
    server = start(folder, folder.parent / "alone.txt", 1)
    try:
        yield ask_all(server)
    finally:
        server.close()


def test_ranks_answer_as_one_process_does_and_leave_with_the_server(
    folder: Path, alone: list[Any]
) -> None:
    server = start(folder, folder.parent / "ranks.txt", RANKS)
    pidfds = [os.pidfd_open(pid) for pid in processes(server)]
    try:
        assert len(pidfds) == RANKS
        for _ in range(2):  # the second time with what the first has left in the cache
            for answer, expected in zip(ask_all(server), alone, strict=True):
                assert [choice[:2] for choice in answer] == [choice[:2] for choice in expected]
                for choice, other in zip(answer, expected, strict=True):
                    assert all(map(close, choice[2], other[2]))
        assert (server.metric("internvl_num_preemptions_total") or 0) > 0
        assert (server.metric("internvl_prefix_cache_hits_total") or 0) > 0
        server.process.kill()
        for pidfd in pidfds:
            readable, _, _ = select.select([pidfd], [], [], DEADLINE)
            assert readable, "a process has outlived its server"
    finally:
        server.close()
        for pidfd in pidfds:
            os.close(pidfd)


def close(first: float, second: float) -> bool:
    return math.isclose(first, second, abs_tol=1e-3)


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_no_stream_notices_that_a_rank_has_died(
    demo_server: Server, tmp_path_factory: pytest.TempPathFactory, flag: str
) -> None:
    log = tmp_path_factory.mktemp("ranks") / "log.txt"
    server = Server(log, [flag, "2"])
    try:
        with ThreadPoolExecutor(COUNT) as pool:
            whole = list(pool.map(lambda number: life.stream(demo_server, number), range(KILLED)))
            (_, rank) = processes(server)
            begun = threading.Barrier(KILLED, lambda: os.kill(rank, signal.SIGKILL))
            streams = [pool.submit(life.stream, server, number, begun) for number in range(KILLED)]
            server.wait_for_status("/ready", 503)
            assert [stream.result(DEADLINE) for stream in streams] == whole
        assert server.metric('internvl_engine_faults_total{kind="exit"}') == 1
        assert "ERROR   engine - engine.ranks: rank 1: it ended with signal 9" in log.read_text()
    finally:
        server.close()
