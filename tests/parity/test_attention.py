"""Every attention backend equals attention written out, over ragged rows in scattered blocks."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

from model.attention import BACKENDS
from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.schema import TextConfig

HEAD_DIM = 16

# (new tokens, whole context) of each row.
BATCHES = {
    "one decode": [(1, 7)],
    "decode of equal lengths": [(1, 9), (1, 9), (1, 9)],
    "ragged decode": [(1, 1), (1, 33), (1, 16), (1, 17), (1, 200)],
    "first prefill": [(16, 16)],
    "prefills at block borders": [(15, 15), (16, 16), (17, 17), (1, 1)],
    "second chunk": [(5, 21)],
    "chunk longer than a slice": [(300, 700)],
    "more keys than are gathered at once": [(1, 15_000), (1, 16_000), (1, 12_000), (1, 40_000)],
    "everything at once": [(1, 5), (7, 7), (1, 90), (3, 40), (1, 6), (20, 21), (2, 2)],
}


def config(heads: int, kv_heads: int) -> TextConfig:
    return TextConfig(
        "", heads * HEAD_DIM, 1, heads, kv_heads, HEAD_DIM, 8, 8, 1e-6, 1e4, 999, True, False, False
    )


HERE = [
    name
    for name, kind in BACKENDS.items()
    if kind(config(4, 2)).supports(torch.device("cpu"), torch.float32, 64) is None
]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last tokens of one row, in fp64."""
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    repeat = len(query) // len(key)
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    new, context = scores.shape[1:]
    future = torch.ones_like(scores[0]).triu(context - new + 1).bool()
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ value).transpose(0, 1)


def expected_and_found(
    backend: AttentionBackend,
    rows: list[tuple[int, int]],
    block_size: int,
    dtype: torch.dtype,
    free_blocks: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Write contexts in two goes, the last tokens in the step under test. Blocks that no row has
    are full of ``free_blocks``."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim = backend.heads, backend.kv_heads, backend.head_dim
    needed = [-(-context // block_size) for _, context in rows]
    free = list(range(sum(needed) + 5))
    random.Random(1).shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in needed]
    kv = KVCache(
        dataclasses.replace(config(heads, kv_heads), head_dim=head_dim),
        blocks=sum(needed) + 5,
        block_size=block_size,
        device=torch.get_default_device(),
        dtype=dtype,
    )
    kv.layers[0].fill_(0)
    kv.layers[0][free] = free_blocks
    shape = (kv_heads, head_dim)
    keys = [torch.randn(context, *shape).to(dtype) for _, context in rows]
    values = [torch.randn(context, *shape).to(dtype) for _, context in rows]

    def batch(tables: list[list[int]], lengths: list[int], starts: list[int]) -> AttentionBatch:
        slots = [
            table[p // block_size] * block_size + p % block_size
            for table, length, start in zip(tables, lengths, starts, strict=True)
            for p in range(start, start + length)
        ]
        contexts = [s + n for s, n in zip(starts, lengths, strict=True)]
        width = max(needed)
        return AttentionBatch(
            query_starts=torch.tensor([0, *lengths]).cumsum(0).int(),
            context_lengths=torch.tensor(contexts).int(),
            slots=torch.tensor(slots),
            block_tables=torch.tensor([t + t[:1] * (width - len(t)) for t in tables]),
            queries=tuple(lengths),
            contexts=tuple(contexts),
        )

    old = [context - new for new, context in rows]
    earlier = [i for i, count in enumerate(old) if count]
    if earlier:
        lengths = [old[i] for i in earlier]
        plan = backend.plan(batch([tables[i] for i in earlier], lengths, [0] * len(earlier)), kv)
        past = [torch.cat([x[i][: old[i]] for i in earlier]) for x in (keys, values)]
        backend.write(kv.layers[0], past[0], past[1], plan)
    news = [new for new, _ in rows]
    queries = [torch.randn(new, heads, head_dim).to(dtype) for new in news]
    plan = backend.plan(batch(tables, news, old), kv)
    key = torch.cat([k[n:] for k, n in zip(keys, old, strict=True)])
    value = torch.cat([v[n:] for v, n in zip(values, old, strict=True)])
    backend.write(kv.layers[0], key, value, plan)
    found = backend.attend(torch.cat(queries), key, value, kv.layers[0], plan)
    expected = [written_out(*row) for row in zip(queries, keys, values, strict=True)]
    return torch.cat(expected), found.double()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_attention_equals_the_formula(
    name: str, rows: str, heads: int, kv_heads: int, block_size: int
) -> None:
    backend = BACKENDS[name](config(heads, kv_heads))
    expected, found = expected_and_found(backend, BATCHES[rows], block_size, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", HERE)
def test_attention_in_bfloat16_is_as_close_as_its_inputs(name: str) -> None:
    backend = BACKENDS[name](config(4, 2))
    rows = BATCHES["everything at once"]
    expected, found = expected_and_found(backend, rows, 16, torch.bfloat16)
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=0)
