"""What this machine has to compute with, and what the engine would choose of it: for ``internvl
doctor``. Nothing is loaded but small cases to try kernels on.

    python -m engine.doctor [CHECKPOINT]
"""

import dataclasses
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.choices import choose_dtype
from engine.memory import free_memory
from engine.sizing import size
from model import CheckpointError, load_config, ops
from model import triton as kernels
from model.attention import BACKENDS
from model.native import BEST, LIBRARY
from model.schema import ModelConfig, TextConfig
from wire.settings import EngineSettings

GIB = 1 << 30
OK, POOR, BAD = "ok", "poor", "bad"
_LEVELS = {1: "any processor", 2: "AVX2", 3: "AVX-512 with bfloat16", 4: "AMX"}
# Of InternVL3-8B, where no checkpoint is named.
_USUAL = TextConfig(
    backbone="Qwen2ForCausalLM",
    hidden_size=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=151674,
    eps=1e-6,
    rope_theta=1e6,
    max_positions=32768,
    qkv_bias=True,
    out_bias=False,
    tied=False,
)


Finding = tuple[str, str]
"""OK, POOR (it works, but could do better) or BAD (it does not), and what was found."""


def examine(checkpoint: str = "") -> Iterator[Finding]:
    """All findings, one after the other; the first ones take no time."""
    yield OK, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield OK, f"torch {torch.__version__}" + ("" if device.type == "cuda" else ", without CUDA")
    yield OK, _device(device)
    if device.type == "cuda":
        fault = kernels.missing(device)
        yield (POOR if fault else OK), f"Triton kernels: {fault or 'they work'}"
    elif LIBRARY:
        yield OK, f"the project's own C, for {_LEVELS[LIBRARY.internvl_choose(BEST)]}"
    else:
        yield (
            POOR,
            "the project's own C was not compiled: install again with a C compiler, such as gcc",
        )
    text, dtype = _USUAL, torch.bfloat16
    if checkpoint:
        try:
            config = load_config(Path(checkpoint))
        except CheckpointError as error:
            yield BAD, f"this checkpoint cannot be served: {error}"
        else:
            text, dtype = config.text, choose_dtype(EngineSettings(), config, device)
            yield OK, f"checkpoint of the format {config.format!r}, with {text.backbone}"
            yield _memory_plan(config, device, dtype)
    yield OK, f"computed in {str(dtype).removeprefix('torch.')}"
    yield OK, f"operations: {ops.choose(device, dtype).name}"
    chosen = False
    for name, backend in BACKENDS.items():
        if backend.on_request:  # may compile for minutes
            yield OK, f"attention: {name}: only by --attention-backend {name}"
            continue
        reason = backend(text).supports(device, dtype, EngineSettings.block_size)
        found = reason or ("could be used" if chosen else "is used")
        chosen = chosen or reason is None
        yield OK, f"attention: {name}: {found}"
    if not chosen:
        yield BAD, "no attention can be used"


def _memory_plan(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Finding:
    settings = EngineSettings(dtype=str(dtype).removeprefix("torch."))
    if device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(device)
    else:
        memory, share = free_memory(), settings.cpu_memory_utilization
        settings = dataclasses.replace(settings, gpu_memory_utilization=share)
    plan = size(config, settings, memory)
    parts = {"weights": plan.weights, "a step about": plan.step, "encoded pictures": plan.pictures}
    told = ", ".join(f"{name} {count / GIB:.2f} GiB" for name, count in parts.items())
    room = f"room for {plan.tokens} tokens beside them, a sequence has up to {plan.context}"
    state = OK if plan.fits else POOR if plan.tokens else BAD
    return state, f"memory: {told}; {room}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {free_memory() / GIB:.1f} GiB of memory free"


def main() -> int:
    """Print it; 1 if something is bad."""
    findings = []
    for finding in examine(*sys.argv[1:]):
        findings.append(finding)
        state, text = finding
        print(f"{state:4}  {text}", flush=True)
    return int(any(state == BAD for state, _ in findings))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may have read enough
    sys.exit(main())
