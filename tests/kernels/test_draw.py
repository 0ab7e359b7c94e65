"""The draw in one kernel is the one of the steps: it keeps the same tokens and takes the same."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.sampling import FILTERS, fused, sampler
from engine.sampling.base import NOT_FINITE, NOTHING_LEFT, SampleRow
from engine.sampling.noise import exponentials
from engine.sampling.sampler import sample
from wire.sampling import SamplingParams

VOCAB = 5003  # two blocks and a rest

FILTERED = {
    "nothing": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "hardly any temperature": SamplingParams(temperature=1e-9),
    "top-k": SamplingParams(top_k=40),
    "top-k of all": SamplingParams(top_k=VOCAB + 9),
    "top-p": SamplingParams(top_p=0.9),
    "small top-p": SamplingParams(top_p=1e-6),
    "nearly all of top-p": SamplingParams(top_p=0.999),
    "min-p": SamplingParams(min_p=0.05),
    "all of them": SamplingParams(temperature=1.5, top_k=500, top_p=0.8, min_p=0.001),
}


def row(params: SamplingParams, position: int = 0) -> SampleRow:
    return SampleRow(params, np.zeros(0, np.int64), np.zeros(position, np.int64))


def logits(kind: str, count: int) -> Tensor:
    """Rows ``[count, VOCAB]``."""
    found = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(count)) * 3
    if kind == "ties":
        found = (found * 4).round() / 4
    if kind == "removed":
        found[:, 7:] = -math.inf
    return found


def drawn(logits: Tensor, rows: list[SampleRow], device: torch.device) -> list[int]:
    wishes = torch.from_numpy(fused.wishes(rows))
    return fused.draw(logits.to(device), wishes.to(device)).tolist()


def numbers(out_pointer, key, second_key, BLOCK: tl.constexpr):
    """A kernel."""
    token = tl.arange(0, BLOCK)
    tl.store(
        out_pointer + token, fused._exponential(token, key + token * 0, second_key + token * 0)
    )


def floors(logits_pointer, factors_pointer, notes_pointer, out_pointer, count, BLOCK: tl.constexpr):
    """A kernel."""
    row = tl.program_id(0)
    heat = tl.load(factors_pointer + row * 4)
    top_k = tl.load(factors_pointer + row * 4 + 1).to(tl.int32)
    top_p = tl.load(factors_pointer + row * 4 + 2)
    min_p = tl.load(factors_pointer + row * 4 + 3)
    row_pointer = logits_pointer + row * count
    notes_pointer += row * count
    top, _, _, best = fused._likeliest(row_pointer, count, BLOCK)
    floor, _ = fused._filtered(
        row_pointer, notes_pointer, count, best, top, heat, top_k, top_p, min_p, BLOCK, 256
    )
    tl.store(out_pointer + row, floor)


@pytest.mark.parametrize("kind", ["plain", "ties", "removed"])
def test_the_filters_keep_the_same_tokens(kind: str, device: torch.device) -> None:
    params = list(FILTERED.values())
    given = logits(kind, len(params)).to(device)
    factors = torch.tensor([[max(p.temperature, 1e-6), p.top_k, p.top_p, p.min_p] for p in params])
    found = torch.empty(len(params), device=device)
    notes = torch.empty(len(params), VOCAB, dtype=torch.int32, device=device)
    triton.jit(floors)[(len(params),)](given, factors.to(device), notes, found, VOCAB, BLOCK=1024)
    for one, line, floor in zip(params, given.cpu(), found.cpu(), strict=True):
        expected, scaled = line[None], line[None]
        for step in FILTERS:
            if step.needed(row(one)):
                expected = step.apply(expected, [row(one)])
            if type(step).__name__ == "Temperature":
                scaled = expected
        # Nor is looked at what cannot be drawn, nor was there anything to look at in a removed one.
        hopeless = scaled < scaled.max() - 25
        kept, wanted = scaled >= floor, expected > -math.inf
        kept[hopeless] = wanted[hopeless] = False
        # In doubt is only a token at which the sum comes as good as to p.
        (doubtful,) = (kept != wanted)[0].nonzero(as_tuple=True)
        likely = scaled[0].double().softmax(-1)
        for value in scaled[0, doubtful]:
            before = likely[scaled[0] > value].sum() / likely[scaled[0] > -math.inf].sum()
            assert abs(before - one.top_p) < 1e-5, one
        assert len(doubtful) <= (0 if kind == "removed" else 1), one


@pytest.mark.parametrize("kind", ["plain", "ties"])
def test_the_same_tokens_are_drawn(kind: str, device: torch.device) -> None:
    params = [p for p in FILTERED.values() for _ in range(3)]
    rows = [row(p, position) for position, p in enumerate(params)]
    given = logits(kind, len(rows))
    assert drawn(given, rows, device) == sample(given, rows).tolist()


@pytest.mark.parametrize("pair", [(5, -7), (-(1 << 31), (1 << 31) - 1)])
def test_the_numbers_are_those_of_the_cpu(pair: tuple[int, int], device: torch.device) -> None:
    found = torch.empty(1 << 14, device=device)
    triton.jit(numbers)[(1,)](found, *pair, BLOCK=len(found))
    expected = exponentials(torch.tensor([pair], dtype=torch.int32), len(found))[0]
    assert expected.min() < 1e-3  # where a logarithm of 1 - u would be off
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)


def test_greedy_rows_take_the_first_of_the_likeliest(device: torch.device) -> None:
    given = logits("plain", 3)
    given[1, [4000, 30, 30 + 2048]] = 99.0
    rows = [
        row(SamplingParams(temperature=0.0)),
        row(SamplingParams(top_k=1)),
        row(SamplingParams()),
    ]
    first, second, _ = drawn(given, rows, device)
    assert first == given[0].argmax()
    assert second == 30


def test_plain_rows_are_drawn_without_the_host(device: torch.device) -> None:
    """As in a graph, where greedy rows fill the batch up."""
    given = logits("plain", 4)
    params = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.7)]
    rows = [row(one, position) for position, one in enumerate(params)]
    wanted = sampler.draws(rows, 4)
    assert wanted is not None
    for draws in (torch.from_numpy(wanted), None):
        wishes = fused.plain_wishes(None if draws is None else draws.to(device), given.to(device))
        found = fused.draw(given.to(device), wishes)
        assert found.tolist() == sampler.sample_plain(given, draws).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_rows_that_cannot_be_drawn_say_why_and_leave_the_others(
    temperature: float, device: torch.device
) -> None:
    given = logits("plain", 6)
    rows = [row(SamplingParams(temperature=temperature, top_p=0.9), n) for n in range(6)]
    given[1, VOCAB - 1] = math.nan
    given[2, 0] = math.inf
    given[3] = -math.inf
    given[4] = -math.inf
    given[4, 9] = math.nan
    found = drawn(given, rows, device)
    assert found == sample(given, rows).tolist()
    assert found[1:5] == [NOT_FINITE, NOT_FINITE, NOTHING_LEFT, NOT_FINITE]
    assert min(found[0], found[5]) >= 0
