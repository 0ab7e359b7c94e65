"""The engine process and its client, with real processes and sockets; the model is a stub."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.client import ProcessEngine
from tests import fake_runner
from tests.fake_runner import request
from wire.channel import Channel
from wire.errors import EngineFailed, Unavailable
from wire.messages import EngineOutput, Fault, FromEngine
from wire.settings import EngineSettings

DEADLINE = 60.0
SETTINGS = EngineSettings(block_size=16, max_num_seqs=32)
ENDLESS = 9_000
ROOT = Path(__file__).resolve().parents[2]


def stub(*options: str) -> list[str]:
    return [sys.executable, "-m", "tests.process.stub_engine", *options]


@contextlib.asynccontextmanager
async def engine(*options: str, wait: bool = True, **limits: float) -> AsyncIterator[ProcessEngine]:
    client = ProcessEngine(SETTINGS, command=stub(*options), **limits)
    await client.start()
    try:
        if wait:
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        yield client
    finally:
        await asyncio.wait_for(client.stop(), DEADLINE)


async def collect(client: ProcessEngine, name: str, *parts: object, **options: object) -> list[int]:
    tokens: list[int] = []
    async for output in client.submit(*request(name, *parts, **options)):
        tokens += output.token_ids
        last = output
    assert last.finish_reason == "length", last
    return tokens


async def until(condition: object, what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        await asyncio.sleep(0.01)


def wait_gone(pidfd: int) -> None:
    """Wait on a pidfd, which becomes readable when its process has ended, reaped or not."""
    readable, _, _ = select.select([pidfd], [], [], DEADLINE)
    os.close(pidfd)
    assert readable, "the process is still there"


async def first(stream: AsyncIterator[EngineOutput]) -> EngineOutput:
    return await asyncio.wait_for(anext(stream), DEADLINE)


async def test_concurrent_requests_each_get_their_own_tokens() -> None:
    parts = [(3 + i, (i % 4, 1 + i % 3), 2) for i in range(24)]
    options = [{"max_tokens": 20, "seed": 900 + i} for i in range(24)]
    async with engine() as client:
        together = await asyncio.gather(
            *(collect(client, f"t{i}", *parts[i], **options[i]) for i in range(24))
        )
        alone = [await collect(client, f"a{i}", *parts[i], **options[i]) for i in range(24)]
        assert together == alone
        await until(lambda: client.stats.running == 0, "the engine is idle")
        assert client.stats.blocks_used == 0


async def test_start_up_progress_is_reported_while_loading() -> None:
    async with engine("load=hang", wait=False) as client:
        await until(lambda: client.progress is not None, "progress")
        assert (client.progress.stage, client.state) == ("weights", "starting")
        with pytest.raises(Unavailable):
            await anext(client.submit(*request("r", 3)))


async def test_closing_a_stream_early_frees_everything_it_held() -> None:
    async with engine() as client:
        stream = client.submit(*request("r", 5, (1, 2), 5, max_tokens=ENDLESS))
        await first(stream)
        await until(lambda: client.stats.blocks_used > 0, "blocks are in use")
        await stream.aclose()
        await until(lambda: client.stats.running == 0, "the request is gone")
        assert client.stats.blocks_used == 0


async def test_cancelling_the_reader_aborts_the_request() -> None:
    async with engine() as client:
        reader = asyncio.create_task(collect(client, "r", 5, max_tokens=ENDLESS))
        await until(lambda: client.stats.running == 1, "the request runs")
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(lambda: client.stats.running == 0, "the request is gone")


async def test_a_reader_that_ends_at_the_last_output_sends_no_abort() -> None:
    async with engine() as client:
        async with contextlib.aclosing(client.submit(*request("r", 5, max_tokens=1))) as stream:
            assert (await first(stream)).finish_reason == "length"
        assert client._outbox.empty()


async def test_a_request_that_cannot_fit_ends_with_an_error_and_the_others_go_on() -> None:
    async with engine() as client:
        other = asyncio.create_task(collect(client, "ok", 5, max_tokens=50))
        output = await first(client.submit(*request("long", 10_000)))
        assert output.finish_reason == "error"
        assert "limit of 10000" in output.error
        assert len(await other) == 50


PARTS = [(3 + i, (i % 4, 1 + i % 3), 2) for i in range(8)]


def alone(index: int, **options: int) -> list[int]:
    return fake_runner.alone(*PARTS[index], max_model_len=10_000, **options)


async def outcomes(tasks: list["asyncio.Task[list[int]]"]) -> list[object]:
    """Tokens, or the error, of each."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), DEADLINE)


@pytest.mark.parametrize(
    "fault", ["step=kill:9", "step=raise:9", "step=raise:0", "inbox=1", "inbox=5"]
)
async def test_streams_go_on_where_a_dying_engine_left_them(fault: str, tmp_path: Path) -> None:
    options = [{"max_tokens": 40, "seed": 900 + i} for i in range(8)]
    async with engine(fault, f"once={tmp_path / 'mark'}") as client:
        old = client.pid
        tasks = [
            asyncio.create_task(collect(client, f"r{i}", *PARTS[i], **options[i])) for i in range(8)
        ]
        assert await outcomes(tasks) == [alone(i, **options[i]) for i in range(8)]
        assert client.restarts == 1
        assert client.pid != old
        await until(lambda: client.stats.running == 0, "the engine is idle")
        assert client.stats.blocks_used == 0


async def test_a_killed_engine_is_replaced_and_its_streams_end_as_they_would_have() -> None:
    async with engine() as client:
        tasks = [asyncio.create_task(collect(client, "r", 4, max_tokens=600))]
        await until(lambda: client.stats.generated_tokens > 5, "it generates")
        os.kill(client.pid, signal.SIGKILL)
        assert await outcomes(tasks) == [fake_runner.alone(4, max_tokens=600, max_model_len=700)]
        assert client.restarts == 1


@pytest.mark.parametrize("how", ["raise", "kill"])
async def test_a_request_that_engines_die_of_fails_alone(how: str) -> None:
    seeds = [1, 2, 3, 666, 4, 5, 6, 7]
    async with engine(f"seed={how}:666", delay=0.01) as client:
        tasks = [
            asyncio.create_task(collect(client, f"r{i}", *PARTS[i], max_tokens=20, seed=seeds[i]))
            for i in range(8)
        ]
        results = await outcomes(tasks)
        assert isinstance(results[3], EngineFailed)
        assert "told" not in str(results[3])
        for i in (0, 1, 2, 4, 5, 6, 7):
            assert results[i] == alone(i, max_tokens=20, seed=seeds[i])
        assert client.restarts == 2


async def test_an_engine_that_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, sleep = asyncio.Event(), asyncio.sleep

    async def tick(delay: float) -> None:
        """The clock of the watch goes while the engine hangs: nobody knows how long it loads."""
        if delay == 600.0:
            await hangs.wait()
            delay = 0.05
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", tick)
    settings = EngineSettings(block_size=16, engine_timeout=6000.0)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", settings)
    async with engine("step=hang:5", f"once={tmp_path / 'mark'}", stop_timeout=0.1) as client:
        pidfd = os.pidfd_open(client.pid)
        reader = asyncio.create_task(collect(client, "r", 4, max_tokens=30))
        await until(lambda: client.stats.steps >= 4, "it has come to the step")
        hangs.set()
        await until(lambda: client.state != "ready", "it is taken for hung")
        hangs.clear()
        assert await asyncio.wait_for(reader, DEADLINE) == fake_runner.alone(4, max_tokens=30)
        wait_gone(pidfd)
        assert client.restarts == 1


async def test_an_engine_that_hangs_while_it_loads_has_failed() -> None:
    settings = EngineSettings(engine_timeout=0.1)
    client = ProcessEngine(settings, command=["sleep", "600"], stop_timeout=0.01)
    await client.start()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
    assert "engine_timeout" in client.failure
    await client.stop()


async def test_a_stop_while_a_hung_engine_is_being_ended_ends_it() -> None:
    settings = EngineSettings(engine_timeout=0.05)
    client = ProcessEngine(settings, command=["sleep", "600"], stop_timeout=0.5)
    await client.start()
    await until(lambda: client.failure is not None, "it is taken for hung")
    pidfd = os.pidfd_open(client.pid)
    await asyncio.wait_for(client.stop(), DEADLINE)
    wait_gone(pidfd)
    assert client.state == "stopped"


async def test_an_idle_engine_is_not_taken_for_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as client:
        monkeypatch.setattr(client, "_settings", EngineSettings(engine_timeout=0.01))
        watch = asyncio.create_task(client._watch())
        done, _ = await asyncio.wait([watch], timeout=0.1)
        assert not done
        watch.cancel()


async def test_a_request_that_cannot_be_sent_fails_and_the_others_go_on() -> None:
    async with engine(delay=0.01) as client:
        tasks = [
            asyncio.create_task(collect(client, name, 5, max_tokens=30, seed=seed))
            for name, seed in (("good", 1), ("bad", 1 << 70), ("later", 2))
        ]
        good, bad, later = await outcomes(tasks)
        assert isinstance(bad, EngineFailed)
        assert good == fake_runner.alone(5, max_tokens=30, seed=1)
        assert later == fake_runner.alone(5, max_tokens=30, seed=2)


async def test_however_often_it_dies_a_ready_engine_is_replaced() -> None:
    async with engine(delay=0.01) as client:
        for deaths in range(1, 7):
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.state != "ready", "the death is noticed")
            # What comes meanwhile waits for the successor.
            tokens = await asyncio.wait_for(collect(client, "r", 3, max_tokens=4), DEADLINE)
            assert len(tokens) == 4
            assert client.restarts == deaths


async def test_how_large_the_cache_is_is_known_before_the_first_step() -> None:
    async with engine() as client:
        for deaths in (0, 1):
            await until(lambda n=deaths: client.restarts == n and client.state == "ready", "ready")
            assert client.ready is not None
            assert client.stats.blocks_total == client.ready.blocks_total > 0
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.state != "ready", "the death is noticed")


async def test_a_load_that_fails_says_why_and_is_not_repeated() -> None:
    async with engine("load=fail", wait=False) as client:
        with pytest.raises(Unavailable) as caught:
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert "weights" not in str(caught.value)
        assert client.failure == "load: ValueError: there are no weights here"
        assert (client.state, client.restarts) == ("failed", 0)


async def test_restarts_that_cannot_load_come_ever_later_and_then_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def recorded(delay: float) -> None:
        slept.append(delay)
        await sleep(delay)

    monkeypatch.setattr(asyncio, "sleep", recorded)
    limits = {"delay": 0.123, "max_failed_starts": 3}
    async with engine(f"load=fail_after:{tmp_path / 'started'}", **limits) as client:
        reader = asyncio.create_task(collect(client, "r", 3, max_tokens=ENDLESS))
        await until(lambda: client.stats.running == 1, "the request runs")
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(reader, DEADLINE)
        assert (client.state, client.restarts) == ("failed", 3)
        assert [delay for delay in slept if delay in (0.123, 0.246, 0.492)] == [0.123, 0.246]
        with pytest.raises(Unavailable):
            await client.wait_ready()
        with pytest.raises(Unavailable):
            await anext(client.submit(*request("r", 3)))


async def test_a_smaller_successor_says_so(tmp_path: Path) -> None:
    async with engine("step=kill:1", f"once={tmp_path / 'mark'}", "then=50") as client:
        assert client.ready.max_model_len == 10_000
        tokens = await asyncio.wait_for(collect(client, "r", 10, max_tokens=100), DEADLINE)
        assert tokens == fake_runner.alone(10, max_tokens=100)[:40]
        assert client.ready.max_model_len == 50


async def test_a_command_that_does_not_exist_fails_the_start() -> None:
    client = ProcessEngine(SETTINGS, command=[str(ROOT / "no-such-program")])
    await client.start()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
    await client.stop()


@pytest.mark.parametrize("load", ["load=hang", "load=now"])
async def test_stop_ends_the_process_and_every_stream(load: str) -> None:
    async with engine(load, wait=load == "load=now") as client:
        await until(lambda: client.pid is not None and client.progress, "the process runs")
        pidfd = os.pidfd_open(client.pid)
        stream = client.submit(*request("r", 4, max_tokens=ENDLESS))
        if client.state == "ready":
            await first(stream)
        await asyncio.wait_for(client.stop(), DEADLINE)
        wait_gone(pidfd)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        await client.stop()
        assert client.state == "stopped"


async def test_a_process_that_ignores_the_closed_socket_is_killed() -> None:
    code = "import sys, time; sys.stdin.close(); time.sleep(600)"
    client = ProcessEngine(SETTINGS, command=[sys.executable, "-c", code], stop_timeout=0.2)
    await client.start()
    await until(lambda: client.pid is not None, "the process runs")
    pidfd = os.pidfd_open(client.pid)
    await asyncio.wait_for(client.stop(), DEADLINE)
    wait_gone(pidfd)


@pytest.mark.parametrize("spawned", [False, True])
@pytest.mark.parametrize("turns", range(4))
async def test_a_stop_at_any_moment_of_the_start_leaves_no_process(
    spawned: bool, turns: int
) -> None:
    client = ProcessEngine(SETTINGS, command=["sleep", "600"], stop_timeout=0.05)
    await client.start()
    while spawned and client.pid is None:
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(client.stop(), DEADLINE)
    assert client._process is None or client._process.returncode is not None


async def test_signals_for_the_whole_group_do_not_end_the_engine() -> None:
    async with engine() as client:
        os.kill(client.pid, signal.SIGTERM)
        os.kill(client.pid, signal.SIGINT)
        assert len(await collect(client, "r", 5, max_tokens=9)) == 9
        assert client.restarts == 0


@pytest.mark.parametrize(
    ("options", "suspects"), [(["step=raise:0"], ["r"]), (["load=fail"], []), (["inbox=1"], [])]
)
def test_a_fault_names_its_suspects_and_gives_the_exit_status(
    options: list[str], suspects: list[str]
) -> None:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        subprocess.Popen(
            [*stub(*options), str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        ) as process,
    ):
        theirs.close()
        channel: Channel[FromEngine] = Channel(ours, FromEngine)
        channel.send(SETTINGS)
        channel.send(request("r", 3)[0])
        while not isinstance(message := channel.receive()[0], Fault):
            pass
        assert message.suspects == suspects
        assert process.wait(DEADLINE) == 1
    channel.close()


@pytest.mark.parametrize(("level", "shown"), [("info", True), ("warning", False)])
def test_the_engine_logs_at_the_level_it_is_given(level: str, shown: bool) -> None:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        subprocess.Popen(
            [sys.executable, "-m", "engine", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, "INTERNVL_LOG_LEVEL": level},
            stderr=subprocess.PIPE,
        ) as process,
    ):
        theirs.close()
        channel: Channel[FromEngine] = Channel(ours, FromEngine)
        channel.send(SETTINGS)
        channel.close()
        assert (b"leaving" in process.communicate(timeout=DEADLINE)[1]) is shown


async def test_the_client_passes_its_log_level_on(tmp_path: Path) -> None:
    code = (
        f"import os; open({str(tmp_path / 'level')!r}, 'w').write(os.environ['INTERNVL_LOG_LEVEL'])"
    )
    client = ProcessEngine(SETTINGS, log_level="error", command=[sys.executable, "-c", code])
    await client.start()
    await until(lambda: client.state == "failed", "the program has run")
    await client.stop()
    assert (tmp_path / "level").read_text() == "error"


def test_a_first_frame_that_holds_no_settings_ends_the_process() -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        subprocess.Popen(
            [*stub(), str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        ) as process,
    ):
        Channel(ours, FromEngine).send(["no", "settings"])
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("load", ["load=hang", "load=now"])
def test_the_engine_leaves_when_its_parent_is_killed(load: str) -> None:
    parent = textwrap.dedent(
        f"""
        import asyncio, sys
        from engine.client import ProcessEngine
        from tests.fake_runner import request
        from tests.process.test_engine_process import SETTINGS, stub, until, ENDLESS

        async def main():
            client = ProcessEngine(SETTINGS, command=stub({load!r}))
            await client.start()
            await until(lambda: client.progress is not None, "progress")
            if {load!r} == "load=now":
                await client.wait_ready()
                stream = client.submit(*request("r", 4, max_tokens=ENDLESS))
                await anext(stream)
            print(client.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            pidfd = os.pidfd_open(int(process.stdout.readline()))
        finally:
            process.kill()
        wait_gone(pidfd)


async def test_a_stop_token_is_the_last_of_a_stream() -> None:
    async with engine() as client:
        whole = await collect(client, "whole", 4, max_tokens=30)
        stop = whole[12]
        stream = client.submit(*request("r", 4, max_tokens=30, stop=(stop,)))
        outputs = [output async for output in stream]
        assert [t for o in outputs for t in o.token_ids] == whole[: whole.index(stop) + 1]
        assert (outputs[-1].finish_reason, outputs[-1].stop_token) == ("stop", stop)


async def test_a_profile_names_what_the_engine_does_and_ends_with_it() -> None:
    async with engine() as client:
        work = asyncio.create_task(collect(client, "a", 3, max_tokens=ENDLESS))
        await until(lambda: client.stats.running == 1, "the request runs")
        page = await asyncio.wait_for(client.profile(0.3), DEADLINE)
        assert b"(step)" in page
        taken = asyncio.create_task(client.profile(600))
        await asyncio.sleep(0)
        os.kill(client.pid or 0, signal.SIGKILL)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(taken, DEADLINE)
        await asyncio.wait_for(client.wait_ready(), DEADLINE)
        last = asyncio.create_task(client.profile(600))
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await client.stop()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(last, DEADLINE)
