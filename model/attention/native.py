"""Attention on the CPU in bf16, by this project's own C over the blocks where they lie.

Keys and values are kept in the order in which the products read them (model/native/attention.c), so
nothing else can read these blocks. A row's result depends on its own query and context alone.
"""

import dataclasses
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.mlp import MLP
from model.native import LIBRARY, STEP, Batch, Heads, Layer, Layers
from model.ops import Ops
from model.ops.native import NativeOps, grown
from model.rotary import Angles
from model.schema import TextConfig

_MOST_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A batch as the C wants it, and the memory that it names."""

    batch: Batch
    memory: tuple[object, ...]


class NativeAttention(AttentionBackend):
    """See the module."""

    name = "native"
    graph_safe = False

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._prepared: tuple[object, ...] = ()
        self._layers: Layers | None = None
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        if self.head_dim % STEP or self.head_dim > _MOST_HEAD_DIM:
            return f"heads of {self.head_dim}"
        if block_size % STEP:
            return f"blocks of {block_size} tokens are not a multiple of {STEP}"
        if self.heads // self.kv_heads > STEP:
            return f"more than {STEP} query heads for a key head"
        return NativeOps.missing(device, dtype)

    def plan(self, batch: AttentionBatch, cache: KVCache) -> _Plan:
        at_once = LIBRARY.internvl_attend_tokens(self.heads, self.kv_heads)
        rows, tables = len(batch.contexts), batch.block_tables.contiguous()
        tasks = (-(-count // at_once) * self.kv_heads for count in batch.queries)
        numbers = array("q", itertools.accumulate(batch.queries, initial=0))
        numbers.extend(itertools.accumulate(tasks, initial=0))
        numbers.extend(batch.contexts)
        starts, line = numbers.buffer_info()[0], (rows + 1) * numbers.itemsize
        found = Batch(
            slots=batch.slots.data_ptr(),
            tables=tables.data_ptr(),
            starts=starts,
            tasks=starts + line,
            contexts=starts + 2 * line,
            width=tables.shape[1],
            rows=rows,
            tokens=sum(batch.queries),
        )
        return _Plan(found, (batch.slots, tables, numbers))

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = torch.empty((len(qkv), self.heads, self.head_dim), dtype=qkv.dtype)
        self._rotate_write(cache, qkv, query, at, plan)
        return query, query, query  # keys and values are where ``attend`` reads them

    def _rotate_write(
        self, cache: Tensor, qkv: Tensor, query: Tensor, at: Angles, plan: _Plan
    ) -> None:
        plan.batch.cosine, plan.batch.sine = (angle.data_ptr() for angle in at)
        LIBRARY.internvl_rotate_write(
            self._heads(cache, query.shape[1]),
            plan.batch,
            qkv.data_ptr(),
            qkv.stride(0),
            query.data_ptr(),
            cache.data_ptr(),
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
            self._heads(cache, self.heads),
            plan.batch,
            query.data_ptr(),
            cache.data_ptr(),
            mixed.data_ptr(),
        )
        return mixed

    def _heads(self, cache: Tensor, heads: int) -> Heads:
        return Heads(heads, self.kv_heads, self.head_dim, cache.shape[3])

    def layers(
        self, layers: nn.ModuleList, norm: nn.Module, cache: KVCache, ops: Ops
    ) -> Layers | None:
        """The decoder for the C, there as long as this backend is asked for no other; None where
        it has parts that the C cannot compute."""
        if self._prepared != (layers, cache, ops):
            self._layers = self._prepare(layers, norm, cache, ops)
            self._prepared = layers, cache, ops
        return self._layers

    def through(
        self,
        layers: nn.ModuleList,
        norm: nn.Module,
        hidden: Tensor,
        cache: KVCache,
        at: Angles,
        plan: _Plan,
        ops: Ops,
        wanted: Tensor | None,
    ) -> Tensor | None:
        if self.layers(layers, norm, cache, ops) is None:
            return None
        hidden = hidden.contiguous()
        needed = LIBRARY.internvl_decode_scratch(self._layers, len(hidden))
        self._scratch = grown(self._scratch, needed // 2)
        count = len(hidden) if wanted is None else len(wanted)
        out = torch.empty((count, hidden.shape[1]), dtype=hidden.dtype)
        plan.batch.cosine, plan.batch.sine = (angle.data_ptr() for angle in at)
        LIBRARY.internvl_decode(
            self._layers,
            plan.batch,
            None if wanted is None else wanted.data_ptr(),
            count,
            hidden.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
        )
        return out

    def _prepare(
        self, layers: nn.ModuleList, norm: nn.Module, cache: KVCache, ops: Ops
    ) -> Layers | None:
        """The decoder's layers for the C, if it computes all of their parts."""
        if not isinstance(ops, NativeOps) or (last := ops.weight(norm)) is None:
            return None
        found = []
        for layer, kept in zip(cast(Sequence[Any], layers), cache.layers, strict=True):
            attention, mlp = layer.attention, layer.mlp
            if not isinstance(mlp, MLP):
                return None
            norms = [ops.weight(part) for part in (layer.norm1, layer.norm2)]
            if attention.q_norm is not None:
                norms += [ops.weight(part) for part in (attention.q_norm, attention.k_norm)]
            products = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
            matrices = [ops.matrix(part) for part in products]
            if None in matrices or any(weight is None for weight in norms):
                return None
            pointers: list[int | None] = [w.data_ptr() for w in norms if w is not None]
            pointers += [None] * (4 - len(pointers))
            found.append(Layer(*pointers, *matrices, kept.data_ptr()))
        heads = self._heads(cache.layers[0], self.heads)
        array = (Layer * len(found))(*found)
        return Layers(array, last.data_ptr(), len(found), len(last), norm.eps, heads)
