"""``internvl doctor`` and ``internvl plan``: what this machine has, and what would fit. The model's
side is never imported here: it is a process of its own, as the engine is."""

import argparse
import re
import subprocess
import sys
from typing import Any

import msgspec

from server.checkpoint import with_model
from server.flags import add_flag, given
from wire.loading import load
from wire.settings import each_setting

# Settings that a plan depends on.
PLANNED = (
    *(
        "revision",
        "dtype",
        "quantization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
    ),
    *("max_tiles", "encoder_chunk_tiles", "encoder_cache_bytes", "gpu_memory_utilization"),
)


def add(commands: Any) -> None:
    """Add the commands' parsers."""
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has to serve with",
        description="Say what this machine has to serve with, and what of it would be used. Ends "
        "with 1 if something keeps a model from being served.",
    )
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint folder")
    doctor.set_defaults(run=_doctor)
    plan = commands.add_parser(
        "plan",
        help="say whether a model fits in a device's memory",
        description="Say whether a model fits in a device's memory, from its config.json alone: "
        "neither weights nor device need be here. Ends with 1 if it does not fit.",
    )
    plan.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    plan.add_argument(
        "--gpu-memory", type=_memory, required=True, metavar="SIZE", help="such as 24GiB"
    )
    for _, field, kind in each_setting():
        if field.name in PLANNED:
            add_flag(plan, field, kind)
    plan.set_defaults(run=_plan)


def _doctor(options: argparse.Namespace) -> int:
    from server.doctor import examine

    command = [sys.executable, "-m", "engine.doctor", *([options.model] if options.model else ())]
    status = subprocess.run(command, check=False).returncode
    return status or examine()


def _plan(options: argparse.Namespace) -> int:
    flags = given(options)
    memory = flags.pop("gpu_memory")
    settings = with_model(load(flags, {}), weights=False)
    told = msgspec.json.encode(settings.engine).decode()
    command = [sys.executable, "-m", "engine.sizing", str(memory), told]
    return subprocess.run(command, check=False).returncode


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?", text, re.ASCII | re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory, such as 24GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
