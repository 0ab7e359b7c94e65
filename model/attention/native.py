"""Attention on the CPU in bf16, by this project's own C over the blocks where they lie.

Keys and values are kept in the order in which the products read them (model/native/attention.c), so
nothing else can read these blocks. A row's result depends on its own query and context alone.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.native import LIBRARY, STEP
from model.ops.native import NativeOps
from model.rotary import Angles

_MOST_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class _Plan:
    slots: Tensor  # [N] int64
    tables: Tensor  # [R, width] int64
    starts: np.ndarray  # [R + 1] int64
    contexts: np.ndarray  # [R] int64
    tasks: np.ndarray  # [R + 1] int64: where each row's parts of the work begin


class NativeAttention(AttentionBackend):
    """See the module."""

    name = "native"
    graph_safe = False

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        if self.head_dim % STEP or self.head_dim > _MOST_HEAD_DIM:
            return f"heads of {self.head_dim}"
        if block_size % STEP:
            return f"blocks of {block_size} tokens are not a multiple of {STEP}"
        if self.heads // self.kv_heads > STEP:
            return f"more than {STEP} query heads for a key head"
        return NativeOps.missing(device, dtype)

    def plan(self, batch: AttentionBatch, cache: KVCache) -> _Plan:
        queries = np.array(batch.queries)
        at_once = LIBRARY.internvl_attend_tokens(self.heads, self.kv_heads)
        tasks = -(-queries // at_once) * self.kv_heads
        return _Plan(
            batch.slots,
            batch.block_tables.contiguous(),
            np.append(0, queries.cumsum()),
            np.array(batch.contexts),
            np.append(0, tasks.cumsum()),
        )

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = torch.empty((len(qkv), self.heads, self.head_dim), dtype=qkv.dtype)
        self._rotate_write(cache, qkv, query, at, plan)
        return query, query, query  # keys and values are where ``attend`` reads them

    def _rotate_write(
        self, cache: Tensor, qkv: Tensor, query: Tensor, at: Angles, plan: _Plan
    ) -> None:
        LIBRARY.internvl_rotate_write(
            qkv.data_ptr(),
            qkv.stride(0),
            query.data_ptr(),
            cache.data_ptr(),
            at[0].data_ptr(),
            at[1].data_ptr(),
            plan.slots.data_ptr(),
            len(qkv),
            query.shape[1],
            self.kv_heads,
            self.head_dim,
            cache.shape[3],
        )

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> None:
        turns = torch.ones(len(key), self.head_dim // 2)
        packed = torch.cat((key, value), dim=1).flatten(1)
        self._rotate_write(cache, packed, key[:, :0], (turns, 0 * turns), plan)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: _Plan
    ) -> Tensor:
        query, mixed = query.contiguous(), torch.empty(query.shape, dtype=query.dtype)
        LIBRARY.internvl_attend(
            query.data_ptr(),
            cache.data_ptr(),
            plan.tables.data_ptr(),
            plan.tables.shape[1],
            plan.starts.ctypes.data,
            plan.contexts.ctypes.data,
            plan.tasks.ctypes.data,
            len(plan.contexts),
            self.heads,
            self.kv_heads,
            self.head_dim,
            cache.shape[3],
            mixed.data_ptr(),
        )
        return mixed
