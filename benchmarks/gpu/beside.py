"""Our server on a GPU beside vLLM's: the same checkpoint, cases and client, one after the other.

    DIR/ours/bin/python -m benchmarks.gpu.beside --vllm DIR/vllm/bin/python --out result.json

``DIR`` is what ``carry.py`` unpacked. vLLM is measured in three settings: as it comes; tuned, our
choice of its options (four processes that read requests, pictures handed on through shared memory,
graphs for its encoder); and its engine alone (``benchmarks.gpu.offline``). The checkpoint is made
first, if it is not in ``--work``. The result is written after each case. What fails is noted, and
the rest goes on.
"""

import argparse
import functools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import gpu_cases, our_client
from benchmarks.compare import WARM_UP, Comparison, end_in_order, facts, our_server, without_folders
from benchmarks.gpu.checkpoint import SHAPES
from benchmarks.processes import Server, end, free_port
from benchmarks.table import DEFAULT, OURS, TUNED, aligned, report
from benchmarks.vllm_client import ENVIRONMENT
from server.bench.client import Case
from server.flags import some

SETTINGS = {
    DEFAULT: "",
    TUNED: "--api-server-count 4 --mm-tensor-ipc torch_shm "
    """--compilation-config '{"cudagraph_mm_encoder": true}'""",
}
# Sizes of steps and pictures that are measured: what compiles at first sight does it before.
_WARM_UP = (
    *WARM_UP,
    Case("", "", 16, concurrency=16, input_tokens=1024, output_tokens=16),
    Case("", "", 2, concurrency=2, output_tokens=16, picture=4032, height=3024, photo=True),
)
_QUIET = ["env", *(f"{key}={value}" for key, value in ENVIRONMENT.items())]
_PREPARED = "prepared"
_ALONE_DEADLINE = 600.0


def vllm_server(name: str, python: Path, checkpoint: Path, flags: str, log: Path) -> Server:
    """vLLM's server in one of the ``SETTINGS``, with further flags."""
    port = free_port()
    command = (
        f"{shlex.join([*_QUIET, str(python)])} -m vllm.entrypoints.cli.main serve "
        f"{shlex.quote(str(checkpoint))} --host 127.0.0.1 --port {port} --trust-remote-code "
        f"{SETTINGS[name]} {flags}"
    )
    return Server(name, f"http://127.0.0.1:{port}", command, log)


def engine_alone(python: Path, checkpoint: Path, *flags: str, log: Path) -> dict[str, float]:
    """What ``benchmarks.gpu.offline`` writes. Raises RuntimeError where it does not."""
    out = log.with_suffix(".json")
    out.unlink(missing_ok=True)
    words = [*_QUIET, str(python), "-m", "benchmarks.gpu.offline", str(checkpoint), str(out)]
    with log.open("ab") as sink:
        run = subprocess.Popen([*words, *flags], stdout=sink, stderr=sink, start_new_session=True)
        try:
            run.wait(_ALONE_DEADLINE)
        finally:
            end(run)
    if not out.exists():
        raise RuntimeError(f"its engine alone ended with {run.returncode}; see {log}")
    found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found


def _said(*words: str) -> str:
    """What a program says, but for the end of the line; empty where it cannot."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the result, print its tables."""
    end_in_order()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--vllm", type=Path, help="a Python with vLLM; else ours alone")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--format", choices=("hf", "chat"), default="chat")
    parser.add_argument("--settings", nargs="*", choices=[*SETTINGS, _PREPARED])
    parser.add_argument("--cases", nargs="+", help="ends of their names; default: all")
    parser.add_argument("--requests", type=int, default=10**6, help="at most so many of a case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=some, default=4, help="processes that send")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**5 * 10**4)
    parser.add_argument("--flags", default="", help="for our server")
    parser.add_argument("--vllm-flags", default="", help="for vLLM's")
    parser.add_argument("--device", default="cuda", help="that draws the weights and runs ours")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args(arguments)
    settings = [*SETTINGS, _PREPARED] if given.settings is None else given.settings
    for folder in (given.work, given.logs):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = given.work / f"{given.shape}-{given.format}"
    if not checkpoint.exists():
        # By a process of its own, as torch keeps memory of the device.
        words = f"-m benchmarks.gpu.checkpoint --shape {given.shape} --format {given.format}"
        where = ["--device", given.device, str(checkpoint)]
        subprocess.run([sys.executable, *words.split(), *where], check=True)
    known = facts("our own")
    known["client_processes"] = given.clients
    known["machine"]["gpu"] = _said("nvidia-smi", "-L").splitlines()
    engines = {OURS: (Path(sys.executable), "--device", given.device)}
    # vLLM takes the template as it is, which has no system sentence.
    flags = f"--device {given.device} --system-prompt none {given.flags}"
    servers = [our_server(checkpoint, flags=flags, log=given.logs / f"{OURS}.log")]
    if given.vllm:
        asked = "from importlib.metadata import version; print(version('vllm'), version('torch'))"
        known["vllm_and_torch"] = _said(str(given.vllm), "-c", asked)
        engines["vllm"] = (given.vllm, "--vllm")
        servers += [
            vllm_server(name, given.vllm, checkpoint, given.vllm_flags, given.logs / f"{name}.log")
            for name in SETTINGS
            if name in settings
        ]
    cases = [
        case.at_most(given.requests)
        for case in gpu_cases(given.shape)
        if given.cases is None or case.name.endswith(tuple(given.cases))
    ]
    client = functools.partial(our_client, processes=given.clients)
    comparison = Comparison(cases, client, given.seed, given.out, known, _WARM_UP)
    for number in range(given.rounds):
        for server in servers[:: -1 if number % 2 else 1]:
            try:
                comparison.measure(server, number)
            except Exception as error:
                comparison.record(server, "start", number, _wrong(error))
    alone = comparison.found["engines"] = {}
    for name, (python, *more) in engines.items() if _PREPARED in settings else ():
        log = given.logs / f"{name}-alone.log"
        try:
            alone[name] = engine_alone(python, checkpoint, *more, log=log)
        except Exception as error:
            alone[name] = _wrong(error)
        comparison.write()
    print(aligned(report(comparison.found)))
    print(json.dumps(alone, indent=1))


def _wrong(error: Exception) -> dict[str, str]:
    return {"error": without_folders(f"{type(error).__name__}: {error}")[:500]}


if __name__ == "__main__":
    main()
