"""Attention for CUDA: a library's kernel for rows with several new tokens, a paged decode for rows
with one.

The libraries' kernels for rows of different lengths want keys and values one behind the other. Rows
that begin in this step have them so already; for the others they are gathered from the cache, which
costs a few per cent of computing with them. So no library's own page size matters here.

A kernel is tried on a small case before it is used: one that was built for another device, knows no
grouped heads or aligns the causal mask otherwise is passed over, and the reason is told.
"""

import dataclasses
import importlib
import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from model.attention.base import AttentionBackend, AttentionBatch
from model.attention.sdpa import SdpaAttention
from model.attention.triton_paged import TritonAttention
from model.kv_cache import KVCache
from model.rotary import Angles
from model.schema import TextConfig
from model.transfer import to_device

logger = logging.getLogger(__name__)

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""Causal attention of several rows' last tokens: queries ``[N, heads, head_dim]``, keys and values
``[M, kv_heads, head_dim]``, where each row begins and the last ends in both (``[R + 1]`` int32),
and the longest of both. Back comes ``[N, heads, head_dim]``."""

# Keys gathered per call, unless a single row has more.
_GATHERED = 1 << 13
# As far as 16-bit numbers may be from the formula where all are about 1.
_NEAR = 5e-2


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rows with several new tokens, for one call."""

    tokens: Tensor | slice  # of the flat batch
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    pages: (
        Tensor | None
    )  # [2, keys, kv_heads] lines of the cache; None: the rows begin in this step


@dataclasses.dataclass(frozen=True)
class _Plan:
    decoder: Any  # its own, for the whole batch
    decodes: bool  # whether any row has one new token
    groups: list[_Group]


class FlashAttention(AttentionBackend):
    """See the module. Subclasses name a library."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self._config = config
        self._decode_by(SdpaAttention(config))
        self._varlen: Varlen | None = None

    def _decode_by(self, decoder: SdpaAttention | TritonAttention) -> None:
        self._decoder = decoder
        self.name = f"{type(self).name}+{decoder.name}"
        self.graph_safe = decoder.graph_safe

    @abstractmethod
    def load(self) -> Varlen:
        """The kernel. Raises ImportError or AttributeError where the library is not there."""

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        if device.type not in self.devices:
            return f"it needs {' or '.join(self.devices)}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it does not compute in {dtype}"
        try:
            self._varlen = self.load()
            error = self._error(self._varlen, device, dtype)
        except (ImportError, AttributeError, OSError) as refusal:
            return f"it is not installed ({refusal})"
        except Exception as refusal:  # whatever libraries and drivers come up with
            return f"it fails here ({(str(refusal) or repr(refusal)).splitlines()[0]})"
        if not error < _NEAR:
            return f"it is wrong by {error:.2g} in a small case"
        paged = TritonAttention(self._config)
        reason = paged.supports(device, dtype, block_size)
        if reason is None:
            self._decode_by(paged)
        else:
            logger.info("%s decodes by sdpa: triton: %s", type(self).name, reason)
        return None

    def _error(self, varlen: Varlen, device: torch.device, dtype: torch.dtype) -> float:
        """The largest error over two rows, one of which has older keys."""
        queries, contexts = (3, 2), (7, 2)
        generator = torch.Generator().manual_seed(0)
        shapes = (self.heads, sum(queries)), (self.kv_heads, sum(contexts)), (self.kv_heads, 9)
        query, key, value = (
            torch.randn(count, heads, self.head_dim, generator=generator, device="cpu").to(
                device, dtype
            )
            for heads, count in shapes
        )
        starts, key_starts = (_starts(np.array(counts), device) for counts in (queries, contexts))
        found = varlen(query, key, value, starts, key_starts, max(queries), max(contexts))
        split = (
            part.split(size)
            for part, size in ((query, queries), (key, contexts), (value, contexts))
        )
        expected = [_formula(*(part.double() for part in row)) for row in zip(*split, strict=True)]
        return float((found.double() - torch.cat(expected)).abs().max())

    def plan(self, batch: AttentionBatch, cache: KVCache) -> _Plan:
        several = [row for row, count in enumerate(batch.queries) if count > 1]
        fresh = [row for row in several if batch.queries[row] == batch.contexts[row]]
        cached = [row for row in several if batch.queries[row] < batch.contexts[row]]
        groups = [self._group(batch, rows, None) for rows in [fresh] if rows]
        groups += [self._group(batch, rows, cache) for rows in _bounded(cached, batch.contexts)]
        return _Plan(self._decoder.plan(batch, cache), 1 in batch.queries, groups)

    def _group(self, batch: AttentionBatch, rows: list[int], cache: KVCache | None) -> _Group:
        """One call; the keys are those of the step where there is no cache to gather from."""
        device = batch.slots.device
        queries = np.array([batch.queries[row] for row in rows])
        contexts = np.array([batch.contexts[row] for row in rows])
        pages = None
        if cache is not None:
            pages = self._pages(batch.block_tables, rows, contexts, cache.block_size)
        return _Group(
            _tokens(batch, rows),
            _starts(queries, device),
            _starts(contexts, device),
            int(queries.max()),
            int(contexts.max()),
            pages,
        )

    def _pages(
        self, tables: Tensor, rows: list[int], contexts: np.ndarray, block_size: int
    ) -> Tensor:
        """Where the rows' keys and values lie: ``[2, keys, kv_heads]``, in lines of head_dim."""
        ends = contexts.cumsum()
        positions = np.arange(ends[-1]) - (ends - contexts).repeat(contexts)
        where = np.stack([np.array(rows).repeat(contexts), positions // block_size, positions])
        owners, numbers, positions_there = to_device(where, tables.device)
        block = tables[owners, numbers]
        part = torch.arange(2 * self.kv_heads, device=tables.device).view(2, 1, self.kv_heads)
        pages = block[:, None] * (2 * self.kv_heads) + part
        return pages * block_size + (positions_there % block_size)[:, None]

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> None:
        self._decoder.write(cache, key, value, plan.decoder)

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._decoder.rotate_write(cache, qkv, at, plan.decoder)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: _Plan
    ) -> Tensor:
        mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if plan.decodes:
            self._decoder.decode(mixed, query, cache, plan.decoder)
        for group in plan.groups:
            tokens = group.tokens
            mixed[tokens] = self._mix(query[tokens], key[tokens], value[tokens], cache, group)
        return mixed

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, group: _Group
    ) -> Tensor:
        assert self._varlen is not None  # noqa: S101 - supports() was asked
        if group.pages is not None:
            lines = cache.view(-1, self.head_dim).index_select(0, group.pages.flatten())
            key, value = lines.view(*group.pages.shape, self.head_dim)
        starts, key_starts = group.query_starts, group.key_starts
        longest, longest_key = group.longest_query, group.longest_key
        return self._varlen(query, key, value, starts, key_starts, longest, longest_key)


class Fa3Attention(FlashAttention):
    """FlashAttention-3, for Hopper."""

    name = "fa3"

    def load(self) -> Varlen:
        return _library("flash_attn_interface")


class FlashAttnAttention(FlashAttention):
    """The package flash-attn 2.x."""

    name = "flash_attn"

    def load(self) -> Varlen:
        return _library("flash_attn")


class TorchVarlenAttention(FlashAttention):
    """The FlashAttention-2 inside torch."""

    name = "torch_varlen"

    def load(self) -> Varlen:
        # torch.nn.attention.varlen is public, but knows grouped heads since torch 2.12 only; the
        # kernel under both has kept its first ten arguments since torch 2.3.
        forward = torch.ops.aten._flash_attention_forward

        def call(
            query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor,
            longest: int, longest_key: int,
        ) -> Tensor:  # fmt: skip
            lengths = starts, key_starts, longest, longest_key
            return forward(query, key, value, *lengths, 0.0, True, False)[0]

        return call


def _library(module: str) -> Varlen:
    """Both packages of the FlashAttention project call it alike; older ones return more."""
    function = importlib.import_module(module).flash_attn_varlen_func

    def call(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor,
        longest: int, longest_key: int,
    ) -> Tensor:  # fmt: skip
        found = function(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            cu_seqlens_k=key_starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest_key,
            causal=True,
        )
        return found[0] if isinstance(found, tuple) else found

    return call


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one row's last tokens, written out."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(len(key) - len(query) + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


def _starts(counts: np.ndarray, device: torch.device) -> Tensor:
    return to_device(np.append(0, counts.cumsum()).astype(np.int32), device)


def _tokens(batch: AttentionBatch, rows: list[int]) -> Tensor | slice:
    """The flat batch's tokens of these rows; a slice where they stand one behind the other."""
    ends = list(itertools.accumulate(batch.queries))
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(ends[rows[0]] - batch.queries[rows[0]], ends[rows[-1]])
    spans = [np.arange(ends[row] - batch.queries[row], ends[row]) for row in rows]
    return to_device(np.concatenate(spans), batch.slots.device)


def _bounded(rows: list[int], contexts: tuple[int, ...]) -> list[list[int]]:
    """Split rows so that no part gathers more than ``_GATHERED`` keys, unless it is one row."""
    parts: list[list[int]] = []
    room = 0
    for row in rows:
        if not parts or contexts[row] > room:
            parts.append([])
            room = _GATHERED
        parts[-1].append(row)
        room -= contexts[row]
    return parts
