"""The kernels over the paged cache equal the formulas in float64, whatever lies in free pages."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from model.attention import choose
from model.attention.base import AttentionBackend, AttentionBatch, AttentionStep
from model.attention.flash import FlashAttention, FlashAttnAttention
from model.attention.triton_paged import TritonAttention
from model.kv_cache import KVCache
from model.rotary import Angles, angles, inverse_frequencies, rotate
from model.schema import TextConfig
from model.triton import paged
from tests.parity.test_flash import Library

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 4e-2}
# Length 1, both sides of a page's end, a whole split and one token more.
LENGTHS = [1, 15, 16, 17, 64, 65, 128, 129, 700]


@dataclasses.dataclass
class Case:
    """Rows in scattered blocks, all but their tokens poisoned, and the packed new tokens."""

    config: TextConfig
    kv: KVCache
    batch: AttentionBatch
    qkv: Tensor
    at: Angles
    older: list[Tensor]  # per row [2, kv_heads, tokens, head_dim]

    def expected(self) -> Tensor:
        """Attention written out, ``[N, heads * head_dim]`` float64."""
        config = self.config
        heads = self.qkv.unflatten(-1, (-1, config.head_dim))
        both = config.heads + config.kv_heads
        turned = rotate(heads[:, :both], self.at)
        key_value = torch.stack((turned[:, config.heads :], heads[:, both:])).transpose(1, 2)
        ends = itertools.accumulate(self.batch.queries)
        mixed = []
        for count, end, older in zip(self.batch.queries, ends, self.older, strict=True):
            own = slice(end - count, end)
            key, value = torch.cat((older, key_value[:, :, own]), dim=2).double()
            group = config.heads // config.kv_heads
            key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
            query = turned[own, : config.heads].double().transpose(0, 1)
            scores = query @ key.transpose(1, 2) / math.sqrt(config.head_dim)
            future = torch.ones_like(scores, dtype=torch.bool).triu(key.shape[1] - count + 1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            mixed.append((weights @ value).transpose(0, 1).flatten(1))
        return torch.cat(mixed)

    def found(self, backend: AttentionBackend | None = None) -> Tensor:
        backend = backend or TritonAttention(self.config)
        step = AttentionStep(backend, self.batch, self.kv, self.at)
        return step(0, self.qkv.clone()).double()


def case(
    rows: list[tuple[int, int]],
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_heads: int = 2,
) -> Case:
    """``rows`` are (new tokens, whole context)."""
    torch.manual_seed(0)
    heads = group * kv_heads
    config = TextConfig(
        "", 8, 1, heads, kv_heads, head_dim, 8, 8, 1e-6, 1e4, 999, True, False, False
    )
    counts = [-(-context // block_size) for _, context in rows]
    free = list(range(sum(counts) + 5))
    random.Random(1).shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in counts]
    kv = KVCache(config, blocks=sum(counts) + 5, block_size=block_size, device=device, dtype=dtype)
    kv.layers[0].fill_(math.nan)
    older, slots = [], []
    for (new, context), table in zip(rows, tables, strict=True):
        positions = range(context)
        where = [table[p // block_size] * block_size + p % block_size for p in positions]
        past = torch.randn(2, kv_heads, context - new, head_dim, device=device).to(dtype)
        for token in range(context - new):
            slot = where[token]
            kv.layers[0][slot // block_size, :, :, slot % block_size] = past[:, :, token]
        older.append(past)
        slots += where[context - new :]
    news = [new for new, _ in rows]
    contexts = [context for _, context in rows]
    batch = AttentionBatch(
        query_starts=torch.tensor([0, *itertools.accumulate(news)], device=device).int(),
        context_lengths=torch.tensor(contexts, device=device).int(),
        slots=torch.tensor(slots, device=device),
        block_tables=torch.tensor(
            [t + t[:1] * (max(counts) - len(t)) for t in tables], device=device
        ),
        queries=tuple(news),
        contexts=tuple(contexts),
    )
    positions = torch.tensor([p for new, context in rows for p in range(context - new, context)])
    at = angles(positions.to(device), inverse_frequencies(head_dim, 1e4, device))
    qkv = torch.randn(sum(news), (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    return Case(config, kv, batch, qkv, at, older)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [5, 6, 7, 8])
def test_decode_of_ragged_rows(group: int, head_dim: int, device: torch.device) -> None:
    block_size = 16 if group % 2 else 64
    rows = [(1, length) for length in LENGTHS]
    ragged = case(rows, group, head_dim, block_size, torch.float32, device)
    torch.testing.assert_close(ragged.found(), ragged.expected(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decode_in_half_types(dtype: torch.dtype, device: torch.device) -> None:
    ragged = case([(1, 1), (1, 63), (1, 300)], 7, 64, 64, dtype, device)
    expected, tolerance = ragged.expected(), TOLERANCE[dtype]
    torch.testing.assert_close(ragged.found(), expected, atol=tolerance, rtol=0)


def test_rows_with_several_tokens_stand_between_decodes(device: torch.device) -> None:
    rows = [(1, 5), (7, 7), (1, 90), (3, 40), (20, 21), (1, 1)]
    mixed = case(rows, 7, 64, 16, torch.float32, device)
    torch.testing.assert_close(mixed.found(), mixed.expected(), atol=2e-6, rtol=0)
    out = torch.full((len(mixed.qkv), 14, 64), math.nan, device=device)
    batch = mixed.batch
    lengths = batch.query_starts, batch.context_lengths
    paged.decode(torch.ones_like(out), mixed.kv.layers[0], *lengths, batch.block_tables, out)
    assert out[1:8].isnan().all(), "a row with several tokens was touched"


@pytest.mark.parametrize("parts", [1, 2, 8, 64])
def test_any_number_of_splits_gives_the_same(parts: int, device: torch.device) -> None:
    ragged = case([(1, length) for length in LENGTHS], 6, 64, 64, torch.float32, device)
    expected = ragged.expected().unflatten(-1, (-1, 64))
    cache, batch = ragged.kv.layers[0], ragged.batch
    paged.rotate_write(cache, ragged.qkv, *ragged.at, batch.slots, ragged.config.heads)
    query = ragged.qkv.unflatten(-1, (-1, 64))[:, : ragged.config.heads]
    batch.context_lengths[3], expected[3] = 0, 0.0
    out = torch.full_like(query, math.nan)
    lengths = batch.query_starts, batch.context_lengths
    paged.decode(query, cache, *lengths, batch.block_tables, out, parts)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_a_plan_is_replayed_with_other_lengths(device: torch.device) -> None:
    """As a captured graph does: same tensors, other contents; one row only fills the batch up."""
    now, later = (
        case([(1, length) for length in lengths], 7, 64, 16, torch.float32, device)
        for lengths in [(900, 2, 5), (40, 600, 17)]
    )
    wide = max(now.batch.block_tables.shape[1], later.batch.block_tables.shape[1])
    tables = torch.zeros(4, wide, dtype=torch.long, device=device)
    batch = AttentionBatch(
        query_starts=torch.arange(5, device=device).int(),
        context_lengths=torch.zeros(4, device=device).int(),
        slots=torch.full((4,), -1, device=device),
        block_tables=tables,
        queries=(1, 1, 1, 1),
        contexts=(1, 1, 1, 1),
    )
    backend = TritonAttention(now.config)
    for one in (now, later):
        plan = backend.plan(batch, one.kv)
        batch.context_lengths[:3] = one.batch.context_lengths
        batch.slots[:3] = one.batch.slots
        tables[:3, : one.batch.block_tables.shape[1]] = one.batch.block_tables
        qkv = torch.cat((one.qkv, one.qkv[:1]))
        at = tuple(torch.cat((part, part[:1])) for part in one.at)
        before = one.kv.layers[0].clone()
        query, key, value = backend.rotate_write(one.kv.layers[0], qkv, at, plan)
        mixed = backend.attend(query, key, value, one.kv.layers[0], plan).flatten(1)
        torch.testing.assert_close(mixed[:3].double(), one.expected(), atol=2e-6, rtol=0)
        assert not mixed[3].any()
        changed = (before != one.kv.layers[0]) & one.kv.layers[0].isfinite()
        assert changed.sum() == 3 * 2 * 2 * 64


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_turning_and_storing_touches_the_tokens_slots_alone(
    dtype: torch.dtype, device: torch.device
) -> None:
    one = case([(17, 17), (1, 33), (5, 70)], 7, 128, 16, dtype, device)
    expected = KVCache(
        one.config, blocks=len(one.kv.layers[0]), block_size=16, device=device, dtype=dtype
    )
    expected.layers[0].copy_(one.kv.layers[0])
    reference = TritonAttention(one.config)
    plan = reference.plan(one.batch, one.kv)
    wanted = super(TritonAttention, reference).rotate_write(
        expected.layers[0], one.qkv, one.at, plan
    )
    found = reference.rotate_write(one.kv.layers[0], one.qkv.clone(), one.at, plan)
    # The interpreter cuts bfloat16 off instead of rounding it.
    exact = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 2e-7}
    if dtype == torch.float16:
        exact = {"rtol": 1e-3, "atol": 1e-6}
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **exact)
    torch.testing.assert_close(one.kv.layers[0], expected.layers[0], equal_nan=True, **exact)


def test_a_backend_that_works_is_used_behind_every_library(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.triton.missing", lambda device: None)
    monkeypatch.setattr(FlashAttention, "devices", (device.type,))
    monkeypatch.setattr(FlashAttnAttention, "load", lambda self: None)
    monkeypatch.setattr(FlashAttnAttention, "_error", lambda *_: 0.0)
    config = case([(1, 1)], 7, 64, 16, torch.float16, device).config
    chosen = choose("flash_attn", config, device, torch.float16, 64)
    assert (chosen.name, chosen.graph_safe) == ("flash_attn+triton", True)
    assert choose("triton", config, device, torch.float32, 64).name == "triton"


def test_a_librarys_kernel_and_ours_share_a_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that begin, go on, and stand apart from each other, between rows of one token."""
    varlen = Library().flash_attn_varlen_func
    call = lambda q, k, v, *lengths: varlen(q, k, v, *lengths, causal=True)  # noqa: E731
    monkeypatch.setattr(FlashAttention, "devices", (device.type,))
    monkeypatch.setattr("model.triton.missing", lambda device: None)
    monkeypatch.setattr(FlashAttnAttention, "load", lambda self: call)
    rows = [(1, 40), (7, 20), (5, 5), (1, 3), (9, 9), (2, 70), (3, 19), (1, 17)]
    made = case(rows, 7, 16, 16, torch.float32, device)
    backend = FlashAttnAttention(made.config)
    assert backend.supports(device, torch.bfloat16, 16) is None
    assert backend.name == "flash_attn+triton"
    torch.testing.assert_close(made.found(backend), made.expected(), atol=2e-6, rtol=0)


def test_a_backend_that_does_not_work_says_why(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case([(1, 1)], 7, 64, 16, torch.float32, device).config
    backend = TritonAttention(config)
    assert backend.supports(torch.device("cpu"), torch.float32, 64) == "it needs cuda"
    odd = TritonAttention(dataclasses.replace(config, head_dim=80))
    assert odd.supports(device, torch.float32, 64) == "it knows no heads of 80"
    monkeypatch.setattr("model.triton.missing", lambda device: None)
    decode = paged.decode
    with monkeypatch.context() as patch:
        patch.setattr(paged, "decode", lambda query, *rest: decode(2 * query, *rest))
        assert "it is wrong by" in str(backend.supports(device, torch.float32, 64))
    with monkeypatch.context() as patch:
        patch.setattr(paged, "decode", lambda: None)
        assert "it fails here" in str(backend.supports(device, torch.float32, 64))
    assert backend.supports(device, torch.float32, 64) is None


def test_splits_fill_a_device_and_are_not_made_for_nothing() -> None:
    assert paged.splits(rows=1, kv_heads=4, longest=32768) == 128
    assert paged.splits(rows=1, kv_heads=4, longest=1024) == 8
    assert paged.splits(rows=64, kv_heads=4, longest=32768) == 2
    assert paged.splits(rows=256, kv_heads=4, longest=32768) == 1
    assert paged.splits(rows=1, kv_heads=2, longest=64) == 1
