"""Our server on a GPU beside vLLM's: the same checkpoint, cases and client, one after the other.

    python benchmarks/gpu/carry.py pack carried.tar.xz             where packages can be fetched
    python benchmarks/gpu/carry.py unpack carried.tar.xz /tmp/c    on the GPU's host
    /tmp/c/ours/bin/python -m benchmarks.gpu.beside --vllm /tmp/c/vllm/bin/python --out result.json

vLLM is measured in three settings: as it comes, tuned (four processes that read requests, pictures
handed on through shared memory, graphs for its encoder), and its engine alone, without HTTP and
with pictures that are prepared already. Of each shape the checkpoint is made first, in ``--work``.
The result is written after each case.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import gpu_cases, our_client
from benchmarks.compare import WARM_UP, Comparison, end_in_order, facts, our_server, without_folders
from benchmarks.gpu.checkpoint import SHAPES, make_peers_checkpoint
from benchmarks.processes import Server
from benchmarks.table import DEFAULT, OURS, TUNED, aligned, report
from server.bench.client import Case, Failed

PORT = 8190
SETTINGS = {
    DEFAULT: "",
    TUNED: "--api-server-count 4 --mm-processor-cache-type shm --mm-tensor-ipc torch_shm "
    """--compilation-config '{"cudagraph_mm_encoder": true}'""",
}
# Sizes of steps and pictures that are measured: what compiles at first sight does it before.
_WARM_UP = (
    *WARM_UP,
    Case("", "", 16, concurrency=16, input_tokens=1024, output_tokens=16),
    Case("", "", 2, concurrency=2, output_tokens=16, picture=4032, height=3024, photo=True),
)
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_PREPARED = "prepared"


def vllm_server(name: str, python: Path, checkpoint: Path, flags: str, log: Path) -> Server:
    """vLLM's server in one of the ``SETTINGS``, with further flags."""
    command = (
        f"{shlex.quote(str(python))} -m vllm.entrypoints.cli.main serve "
        f"{shlex.quote(str(checkpoint))} --host 127.0.0.1 --port {PORT} --trust-remote-code "
        f"{SETTINGS[name]} {flags}"
    )
    return Server(name, f"http://127.0.0.1:{PORT}", command, log)


def engine_alone(python: Path, checkpoint: Path, *flags: str, log: Path) -> dict[str, float | str]:
    """What ``benchmarks.gpu.offline`` says, or that it failed."""
    words = [str(python), "-m", "benchmarks.gpu.offline", str(checkpoint), *flags]
    with log.open("ab") as sink:
        run = subprocess.run(words, stdout=subprocess.PIPE, stderr=sink, check=False)
    if run.returncode:
        return {"error": f"it ended with {run.returncode}; see {log.name}"}
    found: dict[str, float | str] = json.loads(run.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the result, print its tables."""
    end_in_order()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--vllm", type=Path, help="a Python with vLLM; else ours alone")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8B"])
    parser.add_argument("--format", choices=("hf", "chat"), default="chat")
    parser.add_argument("--settings", nargs="*", choices=[*SETTINGS, _PREPARED])
    parser.add_argument("--cases", nargs="+", help="ends of their names; default: all")
    parser.add_argument("--requests", type=int, default=10**6, help="at most so many of a case")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**5 * 10**4)
    parser.add_argument("--flags", default="", help="for our server")
    parser.add_argument("--vllm-flags", default="", help="for vLLM's")
    parser.add_argument(
        "--device", default="cuda", help="that draws the weights and runs our engine"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args(arguments)
    os.environ.update(_ENVIRONMENT)
    settings = [*SETTINGS, _PREPARED] if given.settings is None else given.settings
    known = facts("our own")
    comparison = Comparison([], our_client, given.seed, given.out, known, _WARM_UP)
    if torch.cuda.is_available():
        comparison.found["machine"]["gpu"] = [torch.cuda.get_device_name()]
    for folder in (given.work, given.logs):
        folder.mkdir(parents=True, exist_ok=True)
    for shape in given.shapes:
        folder = given.work / f"{shape}-{given.format}"
        if not (folder / "model.safetensors").exists():
            make_peers_checkpoint(folder, SHAPES[shape], given.format, given.device)
        comparison.use(
            [
                case.at_most(given.requests)
                for case in gpu_cases(shape)
                if given.cases is None or case.name.endswith(tuple(given.cases))
            ]
        )
        flags = f"--device {given.device} {given.flags}"
        servers = [our_server(folder, flags=flags, log=given.logs / f"{OURS}.log")]
        if given.vllm:
            servers += [
                vllm_server(name, given.vllm, folder, given.vllm_flags, given.logs / f"{name}.log")
                for name in SETTINGS
                if name in settings
            ]
        for number in range(given.rounds):
            for server in servers[:: -1 if number % 2 else 1]:
                try:
                    comparison.measure(server, number)
                except (RuntimeError, Failed) as error:  # the others go on
                    comparison.record(
                        server, "start", number, {"error": without_folders(str(error))}
                    )
        if _PREPARED in settings:
            engines = {OURS: (Path(sys.executable), "--device", given.device)}
            if given.vllm:
                engines["vllm"] = (given.vllm, "--vllm")
            alone = comparison.found.setdefault("engines", {}).setdefault(shape, {})
            for name, (python, *more) in engines.items():
                alone[name] = engine_alone(python, folder, *more, log=given.logs / f"{name}.log")
                comparison.write()
    print(aligned(report(comparison.found)))
    print(json.dumps(comparison.found.get("engines"), indent=1))


if __name__ == "__main__":
    main()
