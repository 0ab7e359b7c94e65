"""Our own kernels over the paged cache, for CUDA: turning and storing in one, and split-KV decode.

Rows with one new token are read from the device alone: what was captured of a step that has no
others may be replayed with other lengths, blocks and slots. A row that only fills up a captured
batch has length 0 and a negative slot. Rows with several new tokens go the reference's way.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from model import triton as kernels
from model.attention.base import AttentionBackend, AttentionBatch, AttentionStep
from model.attention.sdpa import SdpaAttention
from model.kv_cache import KVCache
from model.rotary import Angles
from model.schema import TextConfig

# As far as 16-bit numbers may be from the reference where all are about 1.
_NEAR = 5e-2


@dataclasses.dataclass(frozen=True)
class _Plan:
    batch: AttentionBatch
    cache: KVCache
    sdpa: SdpaAttention

    @functools.cached_property
    def reference(self) -> Any:
        """The reference's own, made when first wanted: others may see to its rows."""
        return self.sdpa.plan(self.batch, self.cache)


class TritonAttention(AttentionBackend):
    """See the module."""

    name = "triton"
    graph_safe = True

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._config = dataclasses.replace(config, layers=1)
        self._sdpa = SdpaAttention(config)

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        if self.head_dim not in (16, 32, 64, 128, 256):
            return f"it knows no heads of {self.head_dim}"
        if (reason := kernels.missing(device)) is not None:
            return reason
        try:
            error = self._error(device, dtype)
        except Exception as refusal:  # whatever compilers and drivers come up with
            return f"it fails here ({(str(refusal) or repr(refusal)).splitlines()[0]})"
        return None if error < _NEAR else f"it is wrong by {error:.2g} in a small case"

    def _error(self, device: torch.device, dtype: torch.dtype) -> float:
        """The largest difference from the reference where a row begins and one has older keys."""
        kv = KVCache(self._config, blocks=3, block_size=16, device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        kv.layers[0].copy_(random(*kv.layers[0].shape))
        tables = torch.tensor([[1, 1], [2, 0]], device=device)
        batch = AttentionBatch(
            query_starts=torch.arange(3, dtype=torch.int32, device=device),
            context_lengths=torch.tensor([1, 20], dtype=torch.int32, device=device),
            slots=torch.tensor([16, 3], device=device),
            block_tables=tables,
            queries=(1, 1),
            contexts=(1, 20),
        )
        turns = torch.tensor([0.0, 1.0], device=device)[:, None, None]
        turns = turns.expand(-1, -1, self.head_dim // 2).contiguous()
        qkv = random(2, (self.heads + 2 * self.kv_heads) * self.head_dim)
        mixed = [
            AttentionStep(backend, batch, kv, (turns.cos(), turns.sin()))(0, qkv.clone()).float()
            for backend in (self, self._sdpa)
        ]
        return float((mixed[0] - mixed[1]).abs().max())

    def plan(self, batch: AttentionBatch, cache: KVCache) -> _Plan:
        return _Plan(batch, cache, self._sdpa)

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> None:
        slots, size = plan.batch.slots, plan.cache.block_size
        block = torch.div(slots, size, rounding_mode="floor")
        cache[block, :, :, slots % size] = torch.stack((key, value), dim=1)

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turns in place: what comes back are parts of ``qkv``."""
        # Triton takes a while to import, and is not there on every machine.
        from model.triton import paged

        paged.rotate_write(cache, qkv, *at, plan.batch.slots, self.heads)
        counts = [self.heads, self.kv_heads, self.kv_heads]
        query, key, value = qkv.unflatten(-1, (sum(counts), -1)).split(counts, dim=1)
        return query, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: _Plan
    ) -> Tensor:
        mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if 1 in plan.batch.queries:
            self.decode(mixed, query, cache, plan)
        if max(plan.batch.queries) > 1:
            self._sdpa.extend(mixed, query, key, value, cache, plan.reference)
        return mixed

    def decode(self, mixed: Tensor, query: Tensor, cache: Tensor, plan: _Plan) -> None:
        """The part of ``attend`` for rows with one new token, put into ``mixed``."""
        from model.triton import paged

        batch = plan.batch
        lengths = batch.query_starts, batch.context_lengths
        paged.decode(query, cache, *lengths, batch.block_tables, mixed)
