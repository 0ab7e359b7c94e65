"""The compiler takes every kernel, for the oldest devices with bfloat16 and for Hopper."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    *("_add_norm", "_silu_mul", "_bias_gelu"),
    *("_rotate_write", "_decode", "_reduce"),
    *("_resample", "_patches"),
    *("_draw", "_to_fp8", "_linear"),
    *("_products", "_mix"),
}
# Bytes of a thread's memory beside its registers: one Triton's assembler uses them, another's not.
FEW = 16
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {"80": 163 << 10, "90": 227 << 10}


def test_kernels_compile_for_cuda_devices_without_one(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", *SHARED],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    for arch, most in SHARED.items():
        mine = [(name, *map(int, sizes)) for device, name, *sizes in lines if device == arch]
        assert {name for name, _, _ in mine} == KERNELS
        assert max(shared for _, shared, _ in mine) <= most
        # Products in fp32 are for tests alone.
        assert {name for name, _, spilled in mine if spilled > FEW} <= {"_linear", "_products"}
