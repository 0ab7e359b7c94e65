"""CUDA graphs without CUDA: what was captured is run again, with an attention that allows it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.base import AttentionBatch
from model.attention.sdpa import SdpaAttention
from model.kv_cache import KVCache


class Replays:
    """A capture that counts what is replayed. As on a device, capturing changes what is static."""

    def __init__(self) -> None:
        self.captured = self.count = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        function()

        def replay() -> None:
            self.count += 1
            function()

        return replay


@dataclasses.dataclass(frozen=True)
class _Singles:
    batch: AttentionBatch
    cache: KVCache


class MaskedAttention(SdpaAttention):
    """Computes rows of one new token from nothing but what tensors hold when it runs."""

    name = "masked"
    graph_safe = True

    def plan(self, batch: AttentionBatch, cache: KVCache) -> Any:
        single = set(batch.queries) == {1}
        return _Singles(batch, cache) if single else super().plan(batch, cache)

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: Any) -> None:
        if not isinstance(plan, _Singles):
            super().write(cache, key, value, plan)
            return
        real, size = plan.batch.slots >= 0, plan.cache.block_size
        slots = plan.batch.slots[real]
        cache[slots // size, :, :, slots % size] = torch.stack((key[real], value[real]), dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: Any) -> Tensor:
        if not isinstance(plan, _Singles):
            return super().attend(query, key, value, cache, plan)
        lengths = plan.batch.context_lengths[:, None]
        kept = cache[plan.batch.block_tables].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        seen = (torch.arange(kept.shape[3]) < lengths)[:, None, None]
        keys, values = kept.where(seen[..., None].view(1, len(query), 1, -1, 1), 0.0)
        # A row of padding sees zeros; without any it would not be a number.
        seen = seen | (lengths == 0)[:, None, None]
        grouped = query.unflatten(1, (self.kv_heads, -1))
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=seen).flatten(1, 2)
