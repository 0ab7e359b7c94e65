"""Our server beside others: same machine, checkpoint, client and cases, in alternating rounds.

    python -m benchmarks.compare --model DIR --out result.json \\
        --peer vllm http://127.0.0.1:8101 "vllm serve DIR --port 8101 --dtype bfloat16" \\
        --vllm-python PEER/bin/python

A round starts one server after the other, sends it all cases and stops it; every second round goes
the other way round. A peer may also be given as the process id of a server that runs already: it is
left running and has no figure for its start. With ``--vllm-python`` the cases are sent by ``vllm
bench serve``, else by our own client, which alone can ask ``transformers serve``. Every case and
round has a seed of its own, the same for all servers. The result is written after each case;
``benchmarks.table`` and ``benchmarks.charts`` show it.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, TransformersClient, our_client
from benchmarks.processes import Sender, Server, cpu_seconds, free_port, machine, machine_seconds
from benchmarks.table import OURS, aligned, report
from benchmarks.vllm_client import VllmClient, VllmProgram
from server.bench.client import Case

WARM_UP = (
    Case("", "", 2, input_tokens=32, output_tokens=8),
    Case("", "", 1, input_tokens=8, output_tokens=4, picture=448),
)


class Comparison:
    """Sends ``cases`` to servers; ``found`` grows by a record for each and is written to ``out``.

    ``client`` makes the client of a URL, for servers that need no other; ``facts`` are written as
    they are. ``warm_up`` is sent first, and not measured.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        client: Callable[[str], Sender],
        seed: int,
        out: Path,
        facts: dict[str, Any],
        warm_up: Sequence[Case] = WARM_UP,
    ) -> None:
        self.cases, self.client, self.seed, self.out = cases, client, seed, out
        self.warm_up = warm_up
        self.records: list[dict[str, Any]] = []
        titles = {case.name: case.title for case in cases}
        self.found = facts | {"seed": seed, "cases": titles, "servers": {}, "records": self.records}

    def measure(self, server: Server, number: int) -> None:
        """The round of this number for a server: start it, send it all cases, stop it."""
        with server:
            self.found["servers"][server.name] = without_folders(server.command_line())
            start = {"ready_s": server.ready_s, "rss_gib": server.rss_gib()}
            self.record(server, "start", number, start)
            client = (server.client or self.client)(server.url)
            for index, case in enumerate(self.warm_up):
                client.measure(case, self.seed + index)
            for index, case in enumerate(self.cases, 1):
                seed = self.seed + 1000 * number + 10 * index
                self.record(server, case.name, number, _measure(server, client, case, seed))

    def record(self, server: Server, case: str, number: int, figures: dict[str, Any]) -> None:
        """Keep figures of a case, or of the start."""
        figures = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in figures.items()
        }
        self.records.append({"server": server.name, "case": case, "round": number} | figures)
        print(json.dumps(self.records[-1]), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """What was found until now."""
        self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def _measure(server: Server, client: Sender, case: Case, seed: int) -> dict[str, Any]:
    """The client's figures, processor seconds of the server, percent of the machine's time that
    neither it nor the client had, memory behind the case."""
    began = time.perf_counter()
    busy, known, spent = machine_seconds(), cpu_seconds(os.getpid(), server.pid), server.cpu_s()
    figures: dict[str, Any]
    try:
        figures = dict(client.measure(case, seed))
    except Exception as error:  # what a server cannot do is a finding too
        figures = {"error": f"{type(error).__name__}: {error}"[:500]}
    wall = (time.perf_counter() - began) * (os.cpu_count() or 1)
    busy, known = machine_seconds() - busy, cpu_seconds(os.getpid(), server.pid) - known
    return (
        {"seed": seed}
        | figures
        | {
            "server_cpu_s": server.cpu_s() - spent,
            "others": 100 * max(0.0, busy - known) / wall,
            "rss_after_gib": server.rss_gib(),
        }
    )


def our_server(
    model: Path | None, name: str = OURS, flags: str = "", log: Path | None = None
) -> Server:
    """``internvl serve`` of this tree on a free port; without a model the demo model."""
    port = free_port()
    command = f"{shlex.quote(sys.executable)} -m server --port {port} {flags}"
    if model is not None:
        command += f" --model {shlex.quote(str(model))}"
    return Server(name, f"http://127.0.0.1:{port}", command, log or Path(os.devnull))


def peer_server(name: str, url: str, command: str, model: Path, logs: Path) -> Server:
    """Another server, which has loaded the checkpoint ``model``."""
    own = functools.partial(TransformersClient, model=str(model))
    client = own if name == "transformers" else None
    return Server(name, url, command, logs / f"{name}.log", client)


def without_folders(command: str) -> str:
    """A command line with names of files in place of their paths."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)*(?=[^\s/'\"])", "", command)


def facts(client: str) -> dict[str, Any]:
    """Where and when, and what was measured by which client."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(
        describe, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": without_folders(shlex.join(["python", *sys.orig_argv[1:]])),
        "client": client,
        "machine": machine(),
    }


def end_in_order() -> None:
    """Stop what was started when asked to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    """Read the command line, write the result, print its tables."""
    end_in_order()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--peer",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "URL", "COMMAND"),
        help="another server; a process id in place of COMMAND: it runs already. One that is "
        "called transformers is asked in the way of `transformers serve`",
    )
    parser.add_argument("--flags", default="", help="for our server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument(
        "--requests",
        type=int,
        default=64,
        help="at most so many of a case, but as many as go at once",
    )
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**5 * 10**4)
    parser.add_argument("--vllm-python", type=Path, help="a Python with vLLM, whose client is used")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    cases = [
        case.at_most(given.requests) for case in CASES if case.name in (given.cases or case.name)
    ]
    given.logs.mkdir(parents=True, exist_ok=True)
    servers = [our_server(given.model, flags=given.flags, log=given.logs / f"{OURS}.log")]
    servers += [peer_server(*peer, given.model, given.logs) for peer in given.peer]
    with contextlib.ExitStack() as stack:
        client: Callable[[str], Sender] = our_client
        if given.vllm_python:
            program = stack.enter_context(VllmProgram(given.vllm_python))
            client = functools.partial(VllmClient, program=program, tokenizer=given.model)
        known = facts("vllm bench serve" if given.vllm_python else "our own")
        comparison = Comparison(cases, client, given.seed, given.out, known)
        for number in range(given.rounds):
            for server in servers[:: -1 if number % 2 else 1]:
                comparison.measure(server, number)
    print(aligned(report(comparison.found)))


if __name__ == "__main__":
    main()
