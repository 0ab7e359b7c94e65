"""The contract of an attention backend.

A step's batch is flat: the new tokens of all rows one behind the other. A backend looks at the
batch once (``plan``), then for every layer turns and stores (``rotate_write``) and mixes
(``attend``). It never allocates blocks and never sees token ids.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from model.kv_cache import KVCache
from model.ops import Ops
from model.rotary import Angles, rotate
from model.schema import TextConfig


@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """One step: R rows with N new tokens in all.

    Row r's new tokens are ``query_starts[r] : query_starts[r + 1]`` of the flat batch and the
    last ones of its ``context_lengths[r]`` tokens; they attend causally. ``slots[n]`` is token
    n's place in the cache (block times block size plus offset). ``block_tables[r]`` lists row
    r's blocks in order; entries beyond them name blocks of the same row. The tuples repeat the
    lengths on the host, so that nothing waits for the device.
    """

    query_starts: Tensor  # [R + 1] int32
    context_lengths: Tensor  # [R] int32
    slots: Tensor  # [N] int64
    block_tables: Tensor  # [R, most blocks of a row] int64
    queries: tuple[int, ...]
    contexts: tuple[int, ...]


class AttentionBackend(ABC):
    """One implementation for one decoder."""

    name: str
    graph_safe: bool
    """Whether a step of single tokens can be captured in a CUDA graph and replayed with others.

    It then reads lengths, slots and blocks on the device alone, and nothing behind a row's length.
    Rows of length 0 with a negative slot are padding.
    """

    on_request = False
    """Whether it is chosen by its name alone, never by "auto"."""

    def __init__(self, config: TextConfig) -> None:
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim

    @abstractmethod
    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """None, or why this backend cannot be used there."""

    @abstractmethod
    def plan(self, batch: AttentionBatch, cache: KVCache) -> Any:
        """What all layers of this step share; handed back to ``write`` and ``attend``."""

    @abstractmethod
    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: Any) -> None:
        """Store ``[N, kv_heads, head_dim]`` keys and values in one layer's cache."""

    def rotate_write(
        self, cache: Tensor, qkv: Tensor, at: Angles, plan: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn queries and keys by their positions' angles, and store keys and values.

        ``qkv`` is ``[N, (heads + 2 * kv_heads) * head_dim]``; back come query, key and value,
        ``[N, heads or kv_heads, head_dim]`` each.
        """
        both = self.heads + self.kv_heads
        heads = qkv.unflatten(-1, (both + self.kv_heads, -1))
        turned, value = rotate(heads[:, :both], at), heads[:, both:]
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        self.write(cache, key, value, plan)
        return query, key, value

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Mix ``[N, heads, head_dim]`` queries with the rows' contexts, same shape back.

        ``key`` and ``value`` are the new ones, which ``write`` has stored already.
        """

    def through(
        self,
        layers: nn.ModuleList,
        norm: nn.Module,
        hidden: Tensor,
        cache: KVCache,
        at: Angles,
        plan: Any,
        ops: Ops,
        wanted: Tensor | None,
    ) -> Tensor | None:
        """All layers of the decoder and its last norm at once, ``[N, hidden] -> [M, hidden]``: the
        ``wanted`` rows, or all. None where they are computed piece by piece. What was in ``hidden``
        may be lost."""
        return None


class AttentionStep:
    """A backend, its plan, the cache and the tokens' angles, bound for one forward pass."""

    def __init__(
        self, backend: AttentionBackend, batch: AttentionBatch, cache: KVCache, at: Angles
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._at = at
        self._plan = backend.plan(batch, cache)

    def through(
        self,
        layers: nn.ModuleList,
        norm: nn.Module,
        hidden: Tensor,
        ops: Ops,
        wanted: Tensor | None,
    ) -> Tensor | None:
        """The backend's ``through`` for this step."""
        backend, cache = self._backend, self._cache
        return backend.through(layers, norm, hidden, cache, self._at, self._plan, ops, wanted)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of ``layer`` for the step's tokens, from their queries, keys and values as
        one row each; ``[N, heads * head_dim]``."""
        backend, cache = self._backend, self._cache.layers[layer]
        query, key, value = backend.rotate_write(cache, qkv, self._at, self._plan)
        return backend.attend(query, key, value, cache, self._plan).flatten(1)
