"""Compiles every kernel to machine code for CUDA devices, without one; run as a program.

The interpreter takes more than the compiler does: types that do not fit, shapes that are no powers
of two, more shared memory than there is. Launches are caught before they reach a driver, and what
they would run is compiled. Prints a line for each: device, kernel, bytes of shared memory, and what
does not fit in a thread's registers.
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.sampling import fused as sampling
from model.triton import experts, fused, int4, paged, pixels, quantize

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def kind(value: object) -> str:
    """How Triton writes the type of an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def compile_for(arch: int) -> Any:
    """What takes the place of a launch."""

    def run(kernel: Any, *args: object, grid: object, warmup: bool, **options: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False))
        constants = {name: options.pop(name) for name in names if name in options}
        signature = {name: kind(values[name]) for name in values}
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, value in values.items()
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        }
        source = ASTSource(
            fn=kernel,
            signature=signature | dict.fromkeys(constants, "constexpr"),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        spilled = stack(compiled.asm["cubin"])
        print(arch, kernel.__name__, compiled.metadata.shared, spilled)  # noqa: T201 - its purpose

    return run


def stack(cubin: bytes) -> int:
    """Bytes of a thread's memory that machine code uses beside registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", told)
    assert found, told
    return int(found[1])


def launch_all() -> None:
    """Every kernel, in the shapes of InternVL3-8B (heads of 128) and 1B (heads of 64)."""
    for dtype, heads, kv_heads, head_dim, block_size in [
        (torch.bfloat16, 28, 4, 128, 64),
        (torch.float32, 14, 2, 64, 16),
    ]:
        cache = torch.empty(8, 2, kv_heads, block_size, head_dim, dtype=dtype)
        qkv = torch.empty(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        angles = torch.empty(2, 4, 1, head_dim // 2)
        paged.rotate_write(cache, qkv, *angles, torch.zeros(4, dtype=torch.long), heads)
        query = qkv.view(4, -1, head_dim)[:, :heads]
        counts = torch.zeros(5, dtype=torch.int32)
        for blocks in (1, 512):  # one split, and many
            tables = torch.zeros(4, blocks, dtype=torch.long)
            paged.decode(query, cache, counts, counts[1:], tables, torch.empty_like(query))
        # One row of a rank with one key head, in a long context: as many splits as there can be.
        lone = torch.empty(8, 2, 1, block_size, head_dim, dtype=dtype)
        tables = torch.zeros(1, (1 << 16) // block_size, dtype=torch.long)
        paged.decode(
            query[:1, :7], lone, counts[:2], counts[:1], tables, torch.empty_like(query[:1, :7])
        )
        rows = torch.empty(4, 3584, dtype=dtype)
        weight = torch.empty(3584, dtype=dtype)
        fused.add_norm(rows, rows, weight, None, 1e-6)
        fused.add_norm(rows, None, weight, weight, 1e-6)
        fused.silu_mul(rows)
        fused.bias_gelu_(rows, weight)
        quantize.to_fp8(rows)
        quantize.add_norm(rows, rows, weight, None, 1e-6)
        quantize.add_norm(rows, None, weight, weight, 1e-6)
        quantize.silu_mul(rows)
        quantize.bias_gelu(rows, None)
        quantize.bias_gelu(rows, weight)
        scale = torch.empty(1152, 3584 // 128)
        packed = torch.empty(1152, 1792, dtype=torch.uint8), scale.byte(), scale, weight[:1152]
        for count in (4, 100):
            int4.linear(torch.empty(count, 3584, dtype=dtype), *packed)
        up, down = torch.empty(1, 1536, 2048, dtype=dtype), torch.empty(1, 2048, 768, dtype=dtype)
        for count in (4, 300):  # experts as those of InternVL3.5-30B-A3B
            chosen = torch.zeros(count, 8, dtype=torch.long)
            shares = torch.empty(count, 8, dtype=dtype)
            x, many = torch.empty(count, 2048, dtype=dtype), (128, -1, -1)
            experts.mix(x, chosen, shares, up.expand(many), down.expand(many))
        tiles = torch.zeros(2, 3, 448, 448, dtype=torch.uint8)
        pixels.patches(tiles, torch.ones(3), torch.ones(3), 14, dtype)
    for height in (300, 2000):  # both orders
        picture = torch.zeros(height, 700, 3, dtype=torch.uint8)
        pixels.tiles(picture, 2, 1, 448, thumbnail=True)
    sampling.draw(torch.zeros(2, 151_674), torch.zeros(2, 6, dtype=torch.int32))


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:]):
        JITFunction.run = compile_for(arch)
        launch_all()
