"""FlashInfer's paged attention, for who asks for it by name.

One wrapper serves rows of one new token and of several alike, with the kernel for prompts: its
decode kernel has no groups of 5, 6 or 7 query heads. It reads our cache as it is (its layout HND).
It compiles its kernels at their first use, for which it needs nvcc and ninja, and plans each step
on the host. A plan cannot be captured in a CUDA graph, so steps are computed without graphs.
"""

import dataclasses
import importlib
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from model import triton as kernels
from model.attention.base import AttentionBackend, AttentionBatch
from model.attention.sdpa import SdpaAttention
from model.attention.triton_paged import TritonAttention
from model.kv_cache import KVCache
from model.rotary import Angles
from model.schema import TextConfig
from model.transfer import to_device

_HEAD_DIMS = (64, 128, 256)
# Bytes for parts of rows that are computed by several blocks: two of 128 queries in fp32 on each of
# a device's multiprocessors, for all heads of a group. The 128 MiB that FlashInfer recommends are
# too few for eight heads of 128.
_WORKSPACE = 256 << 20
# As far as 16-bit numbers may be from the reference where all are about 1.
_NEAR = 5e-2


class FlashInferAttention(AttentionBackend):
    """See the module."""

    name = "flashinfer"
    graph_safe = False
    on_request = True
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._config = dataclasses.replace(config, layers=1)
        self._writer = TritonAttention(config)
        self._fused = False
        self._wrapper: Any = None
        self._planned: torch.cuda.Event | None = None

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        if device.type not in self.devices:
            return f"it needs {' or '.join(self.devices)}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it does not compute in {dtype}"
        if self.head_dim not in _HEAD_DIMS:
            return f"it knows no heads of {self.head_dim}"
        try:
            library = importlib.import_module("flashinfer")
        except ImportError as refusal:
            return f"it is not installed ({refusal})"
        self._fused = kernels.missing(device) is None
        try:
            workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
            self._wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            error = self._error(device, dtype, block_size)
        except Exception as refusal:  # whatever compilers and drivers come up with
            return f"it fails here ({(str(refusal) or repr(refusal)).splitlines()[0]})"
        return None if error < _NEAR else f"it is wrong by {error:.2g} in a small case"

    def _error(self, device: torch.device, dtype: torch.dtype, block_size: int) -> float:
        """The largest difference from the reference where one row has several new tokens behind
        older ones, and one a single token."""
        kv = KVCache(self._config, blocks=4, block_size=block_size, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

        kv.layers[0].copy_(random(*kv.layers[0].shape))
        contexts = (2 * block_size + 1, 1)
        batch = AttentionBatch(
            query_starts=torch.tensor([0, 2, 3], dtype=torch.int32, device=device),
            context_lengths=torch.tensor(contexts, dtype=torch.int32, device=device),
            slots=torch.arange(3, device=device),  # nothing is written
            block_tables=torch.tensor([[2, 0, 3], [1, 1, 1]], device=device),
            queries=(2, 1),
            contexts=contexts,
        )
        query = random(3, self.heads, self.head_dim)
        new = query[:, : self.kv_heads]  # which lie in the cache, where both look for them
        both: tuple[AttentionBackend, ...] = self, SdpaAttention(self._config)
        mixed = [
            backend.attend(query, new, new, kv.layers[0], backend.plan(batch, kv)).float()
            for backend in both
        ]
        return float((mixed[0] - mixed[1]).abs().max())

    def plan(self, batch: AttentionBatch, cache: KVCache) -> Any:
        contexts, size = np.array(batch.contexts), cache.block_size
        counts = -(-contexts // size)
        ends, width = counts.cumsum(), batch.block_tables.shape[1]
        rows = np.arange(len(counts)).repeat(counts)
        places = rows * width + np.arange(ends[-1]) - (ends - counts).repeat(counts)
        pages = batch.block_tables.flatten()[to_device(places, batch.block_tables.device)]
        if self._planned is not None:
            # It plans in memory of the host that is copied to the device later.
            self._planned.synchronize()
        # What the host has anyway, it wants there.
        self._wrapper.plan(
            _ends(np.array(batch.queries).cumsum()),
            _ends(ends),
            pages.int(),
            torch.from_numpy((contexts - (counts - 1) * size).astype(np.int32)),
            self.heads,
            self.kv_heads,
            self.head_dim,
            size,
            causal=True,
            q_data_type=cache.dtype,
        )
        if pages.is_cuda:
            self._planned = torch.cuda.current_stream().record_event()
        return self._writer.plan(batch, cache)  # the wrapper keeps its own

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: Any) -> None:
        self._writer.write(cache, key, value, plan)

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._fused:
            return self._writer.rotate_write(cache, qkv, at, plan)
        return super().rotate_write(cache, qkv, at, plan)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: Any) -> Tensor:
        return self._wrapper.run(query.contiguous(), cache)


def _ends(ends: np.ndarray) -> Tensor:
    """Where rows begin and the last ends."""
    return torch.from_numpy(np.append(0, ends).astype(np.int32))
