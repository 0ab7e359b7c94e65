"""The part about being right: backends, graphs and batches against the CPU and each other."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.harness import Bench
from model import build_model, load_config
from model.attention import BACKENDS
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.direct import load, prompt, run
from tests.parity.test_attention import BATCHES, config, expected_and_found
from tests.parity.test_scheduled import requests
from tests.parity.test_scheduled import run as serve

# Large enough for kernels that want 16 numbers at a time, in groups of seven.
_SHAPE = Shape(size=448, heads=14, kv_heads=2, head_dim=32, mlp=512)


def backends(bench: Bench) -> None:
    """Every attention backend that can be used here equals the formula."""
    dtypes = (torch.float32,) if bench.dry else (torch.float32, torch.float16, torch.bfloat16)
    for name, kind in BACKENDS.items():
        for dtype in dtypes:
            label = f"{name} {dtype}".replace("torch.", "")
            with bench.case(label):
                reason = kind(config(4, 2)).supports(bench.device, dtype, 64)
                if reason is not None:
                    bench.skip(label, reason)
                    continue
                worst = 0.0
                for rows in BATCHES.values() if not bench.dry else list(BATCHES.values())[:3]:
                    for heads in ((4, 4), (4, 2), (7, 1)):
                        backend = kind(config(*heads))
                        backend.supports(bench.device, dtype, 64)
                        with bench.device:
                            expected, found = expected_and_found(backend, rows, 16, dtype)
                        worst = max(worst, float((expected - found).abs().max()))
                near = 1e-5 if dtype == torch.float32 else 3e-2
                bench.check(f"{label} is within {near} of the formula ({worst:.1e})", worst < near)


def model(bench: Bench) -> None:
    """Logits on the device against those of the CPU in fp32."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), shape=_SHAPE)
        ids, tiles = prompt(_SHAPE, [3, 1])
        expected = run(load(folder), ids, tiles)
        for dtype in (torch.float32, torch.bfloat16):
            with bench.case(str(dtype)):
                there = build_model(load_config(folder), folder, device=bench.device, dtype=dtype)
                shown = None if tiles is None else tiles.to(bench.device)
                with bench.device:
                    found = run(there, ids, shown).cpu()
                error = float((found - expected).abs().max() / expected.std())
                near = 1e-3 if dtype == torch.float32 else 0.2
                bench.check(f"logits in {dtype} ({error:.1e} of their deviation)", error < near)


def tokens(bench: Bench) -> None:
    """Tokens of the scheduled engine: on the device as on the CPU, with graphs as without."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), shape=_SHAPE)
        some = requests()[: bench.pick(None, 3)]
        expected, _ = serve(folder, [some])
        usual: dict[str, Any] = {"device": bench.device.type, "dtype": "float32"}
        for settings in (
            {"cuda_graphs": False, "async_scheduling": "off", "attention_backend": "sdpa"},
            {"cuda_graphs": False, "async_scheduling": "off"},
            {"cuda_graphs": False, "async_scheduling": "on"},
            {"cuda_graphs": True, "async_scheduling": "on"},
            {"cuda_graphs": True, "max_num_batched_tokens": 7},
        ):
            label = ", ".join(f"{key}={value}" for key, value in settings.items())
            with bench.case(label):
                found, _ = serve(folder, [some], **usual, **settings)
                bench.check(f"fp32 tokens equal the CPU's: {label}", found == expected)
        if not bench.dry:
            alone, _ = serve(folder, [[one] for one in some], **usual | {"dtype": "bfloat16"})
            together, _ = serve(folder, [some], **usual | {"dtype": "bfloat16"})
            same = sum(alone[name] == together[name] for name in alone)
            bench.record("bf16 requests whose tokens the batch changes", len(alone) - same, "")
