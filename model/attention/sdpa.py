"""The reference backend: torch's scaled-dot-product attention over gathered blocks.

Runs wherever torch runs. Rows with one new token are gathered together, padded to the longest
of their group; rows with more are taken one by one, a slice of queries at a time. Both bound what
a step takes beside the cache: rows that share blocks would otherwise be gathered to many times it.
"""

import dataclasses
import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.transfer import to_device

# Queries per call with a mask, which torch widens to [queries, context] floats.
_SLICE = 256
# Keys gathered per call, padding included, unless a single row has more.
_GATHERED = 1 << 15


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Rows with one new token each."""

    tokens: Tensor | None  # [B] of the flat batch; None: the whole batch, in order
    pages: Tensor
    length: int
    mask: Tensor | None  # [B, 1, 1, length], added; None when all contexts have that length


@dataclasses.dataclass(frozen=True)
class _Extend:
    """One row with several new tokens ``start : end`` of the flat batch."""

    start: int
    end: int
    context: int
    pages: Tensor
    mask: Tensor | None  # [queries, context] bool; None: the row begins in this step


@dataclasses.dataclass(frozen=True)
class _Plan:
    blocks: Tensor  # [N]
    offsets: Tensor  # [N]
    decodes: list[_Decode]
    extends: list[_Extend]


class SdpaAttention(AttentionBackend):
    """See the module."""

    name = "sdpa"
    graph_safe = False

    def supports(self, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        return None

    def plan(self, batch: AttentionBatch, cache: KVCache) -> _Plan:
        ends = list(itertools.accumulate(batch.queries))
        single = [row for row, count in enumerate(batch.queries) if count == 1]
        several = [row for row, count in enumerate(batch.queries) if count > 1]
        return _Plan(
            torch.div(batch.slots, cache.block_size, rounding_mode="floor"),
            batch.slots % cache.block_size,
            [self._decodes(batch, rows, ends, cache) for rows in _groups(single, batch.contexts)],
            [self._extends(batch, row, ends[row], cache) for row in several],
        )

    def _decodes(
        self, batch: AttentionBatch, rows: list[int], ends: list[int], cache: KVCache
    ) -> _Decode:
        device = batch.slots.device
        lengths = [batch.contexts[row] for row in rows]
        longest = max(lengths)
        mask = None
        if min(lengths) < longest:
            seen = to_device(lengths, device)[:, None]
            hidden = torch.arange(longest, device=device) >= seen
            mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=device)
            mask = mask.masked_fill(hidden, -torch.inf)[:, None, None, :]
        whole = len(rows) == len(batch.queries)
        tokens = None if whole else to_device([ends[row] - 1 for row in rows], device)
        table = batch.block_tables[to_device(rows, device)]
        pages = self._pages(table[:, : -(-longest // cache.block_size)])
        return _Decode(tokens, pages, longest, mask)

    def _extends(self, batch: AttentionBatch, row: int, end: int, cache: KVCache) -> _Extend:
        queries, context = batch.queries[row], batch.contexts[row]
        mask = None
        if context > queries:
            device = batch.slots.device
            last = torch.arange(context - queries, context, device=device)
            mask = torch.arange(context, device=device) <= last[:, None]
        pages = self._pages(batch.block_tables[row : row + 1, : -(-context // cache.block_size)])
        return _Extend(end - queries, end, context, pages, mask)

    def _pages(self, table: Tensor) -> Tensor:
        """For ``_gather``: ``[B, 2, kv_heads, n]`` pages of the blocks in ``table`` [B, n].

        A page is one head's keys or values of one block: the longest piece of memory that can
        be copied to its place at once.
        """
        page = torch.arange(2 * self.kv_heads, device=table.device)
        pages = table[:, None, :] * (2 * self.kv_heads) + page[:, None]
        return pages.unflatten(1, (2, self.kv_heads))

    def write(self, cache: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> None:
        cache[plan.blocks, :, :, plan.offsets] = torch.stack((key, value), dim=1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, plan: _Plan
    ) -> Tensor:
        if not plan.extends and len(plan.decodes) == 1 and plan.decodes[0].tokens is None:
            return self._decode(query, cache, plan.decodes[0])
        mixed = torch.empty_like(query)
        self.decode(mixed, query, cache, plan)
        self.extend(mixed, query, key, value, cache, plan)
        return mixed

    def decode(self, mixed: Tensor, query: Tensor, cache: Tensor, plan: _Plan) -> None:
        """The part of ``attend`` for rows with one new token, put into ``mixed``."""
        for rows in plan.decodes:
            tokens = slice(None) if rows.tokens is None else rows.tokens
            mixed[tokens] = self._decode(query[tokens], cache, rows)

    def extend(
        self,
        mixed: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        plan: _Plan,
    ) -> None:
        """The part of ``attend`` for rows with several new tokens, put into ``mixed``."""
        for row in plan.extends:
            part = slice(row.start, row.end)
            if row.mask is None:
                mixed[part] = self._mix(query[part], key[part], value[part])
            else:
                mixed[part] = self._extend(query[part], cache, row, row.mask)

    def _decode(self, query: Tensor, cache: Tensor, group: _Decode) -> Tensor:
        # The query heads that share a key head stand where SDPA expects a sequence of queries.
        query = query.unflatten(1, (self.kv_heads, -1))
        key, value = _gather(cache, group.pages, group.length)
        return scaled_dot_product_attention(query, key, value, attn_mask=group.mask).flatten(1, 2)

    def _extend(self, query: Tensor, cache: Tensor, row: _Extend, mask: Tensor) -> Tensor:
        gathered = _gather(cache, row.pages, row.context)
        key, value = (part[0].transpose(0, 1) for part in gathered)
        slices = []
        for start in range(0, len(query), _SLICE):
            # Keys behind the slice's last query are visible to none of its queries.
            end = min(start + _SLICE, len(query))
            seen = row.context - len(query) + end
            part = mask[start:end, :seen]
            slices.append(self._mix(query[start:end], key[:seen], value[:seen], part))
        return torch.cat(slices)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries ``[n, heads, d]`` over ``[m, kv_heads, d]``; causal where there is no mask."""
        grouped = query.unflatten(1, (self.kv_heads, -1)).permute(1, 2, 0, 3)
        shape = (-1, grouped.shape[1], -1, -1)
        wide_key, wide_value = (
            part.transpose(0, 1)[:, None].expand(shape) for part in (key, value)
        )
        mixed = scaled_dot_product_attention(
            grouped, wide_key, wide_value, attn_mask=mask, is_causal=mask is None
        )
        return mixed.permute(2, 0, 1, 3).flatten(1, 2)


def _gather(cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each ``[B, kv_heads, length, head_dim]``."""
    rows = cache.view(-1, cache.shape[-2] * cache.shape[-1]).index_select(0, pages.flatten())
    both = rows.view(*pages.shape[:3], -1, cache.shape[-1])[..., :length, :]
    return both[:, 0], both[:, 1]


def _groups(rows: list[int], contexts: tuple[int, ...]) -> list[list[int]]:
    """Split rows so that padding at most doubles what a group reads, and no group reads more than
    ``_GATHERED`` keys; longest group first."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -contexts[row]):
        longest = contexts[groups[-1][0]] if groups else 0
        room = groups and (len(groups[-1]) + 1) * longest <= _GATHERED
        if room and contexts[row] * 2 >= longest:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group) for group in groups]
