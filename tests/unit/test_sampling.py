"""Sampling: what the filters keep, and that a draw is fixed by logits, seed and position."""

import math

import msgspec
import pytest
import torch
from torch import Tensor

from engine.sampling import STEPS
from engine.sampling.filters import MinP, Step, Temperature, TopK, TopP
from engine.sampling.sampler import sample, uniform
from wire.sampling import MAX_SEED, SamplingParams

NEUTRAL = SamplingParams()


def rows(count: int, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def kept(step: Step, logits: Tensor, **values: float) -> list[int]:
    params = msgspec.structs.replace(NEUTRAL, **values)
    assert step.needed(params)
    return step.apply(logits[None], [params])[0].isfinite().nonzero()[:, 0].tolist()


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("p", "tokens"), [(0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_tokens_until_their_sum_reaches_it(p: float, tokens: list[int]) -> None:
    assert kept(TopP(), PROBABILITIES.log(), top_p=p) == tokens


def test_top_p_keeps_one_token_however_small() -> None:
    assert kept(TopP(), PROBABILITIES.log(), top_p=1e-9) == [1]


@pytest.mark.parametrize(("k", "tokens"), [(1, [1]), (3, [1, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_likeliest(k: int, tokens: list[int]) -> None:
    assert kept(TopK(), PROBABILITIES.log(), top_k=k) == tokens


@pytest.mark.parametrize(("p", "tokens"), [(0.2, [1, 2, 3, 4]), (0.5, [1, 3]), (1.0, [1])])
def test_min_p_is_relative_to_the_likeliest(p: float, tokens: list[int]) -> None:
    assert kept(MinP(), PROBABILITIES.log(), min_p=p) == tokens


@pytest.mark.parametrize("temperature", [1e-45, 1e-9, 0.5, 2.0])
def test_temperature_divides_and_never_overflows(temperature: float) -> None:
    logits = rows(1) * 100
    params = msgspec.structs.replace(NEUTRAL, temperature=temperature)
    shares = Temperature().apply(logits, [params]).softmax(-1)
    assert shares.isfinite().all()
    assert shares.argmax() == logits.argmax()
    if temperature >= 0.5:
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1))


def test_filters_apply_in_their_order() -> None:
    assert [type(step) for step in STEPS] == [Temperature, TopK, TopP, MinP]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_neutral_values_need_no_step(step: Step) -> None:
    assert not step.needed(NEUTRAL)


def test_rows_are_filtered_by_their_own_values() -> None:
    logits = PROBABILITIES.log().repeat(3, 1)
    params = [
        SamplingParams(top_k=2, seed=1),
        SamplingParams(top_p=0.3, seed=1),
        SamplingParams(seed=1),
    ]
    drawn: list[set[int | None]] = [set(), set(), set()]
    for position in range(300):
        for seen, token in zip(drawn, sample(logits, params, [position] * 3), strict=True):
            seen.add(token)
    assert drawn == [{1, 3}, {1}, {0, 1, 2, 3, 4}]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_k=1)])
def test_greedy_takes_the_likeliest_whatever_the_seed(params: SamplingParams) -> None:
    logits = rows(20)
    for seed in (0, 1):
        seeded = [msgspec.structs.replace(params, seed=seed)] * 20
        assert sample(logits, seeded, [0] * 20) == logits.argmax(-1).tolist()


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = rows(12)
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m, seed=k)
        for t, p, k, m in [(1.0, 1.0, 0, 0.0), (0.7, 0.9, 0, 0.0), (1.5, 1.0, 9, 0.0)] * 4
        for _ in (0,)
    ]
    positions = list(range(12))
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], params[i : i + 1], [i])[0] for i in range(12)]
    order = list(reversed(range(12)))
    turned = sample(logits[order], [params[i] for i in order], order)
    assert together == alone == list(reversed(turned))


def test_a_draw_depends_on_seed_and_position() -> None:
    logits = torch.zeros(1, 1000)
    draws = {
        (seed, position): sample(logits, [SamplingParams(seed=seed)], [position])[0]
        for seed in range(10)
        for position in range(10)
    }
    assert len(set(draws.values())) > 80
    assert draws == {
        key: sample(logits, [SamplingParams(seed=key[0])], [key[1]])[0] for key in draws
    }


def test_draws_follow_the_probabilities() -> None:
    count = 20_000
    logits = PROBABILITIES.log().repeat(count, 1)
    tokens = sample(logits, [NEUTRAL] * count, list(range(count)))
    found = torch.bincount(torch.tensor(tokens), minlength=5) / count
    # Four standard deviations of the likeliest token's share.
    assert (found - PROBABILITIES).abs().max() < 4 * math.sqrt(0.25 / count)


def test_uniform_numbers_are_even_and_never_one() -> None:
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < 1e-3
    assert 1 - 1e-3 < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
    for seed in (0, -1, MAX_SEED, -MAX_SEED - 1):
        assert 0 <= uniform(seed, 2**40) < 1


def test_an_impossible_token_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the interval, where the neighbours have no probability at all."""
    logits = torch.full((1, 9), -math.inf)
    logits[0, 3:6] = torch.tensor([0.0, 1.0, 2.0])
    logits = logits.clamp(min=-1e30)  # finite, and still impossible
    for number, token in ((0.0, 3), (1 - 2.0**-48, 5)):
        monkeypatch.setattr("engine.sampling.sampler.uniform", lambda *_, n=number: n)
        assert sample(logits, [NEUTRAL], [0]) == [token]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [NEUTRAL, SamplingParams(temperature=0.0)])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others(
    bad: float, params: SamplingParams
) -> None:
    logits = rows(3)
    expected = sample(logits, [params] * 3, [0, 1, 2])
    logits[1, 17] = bad
    assert sample(logits, [params] * 3, [0, 1, 2]) == [expected[0], None, expected[2]]
    assert sample(logits[1:2], [params], [0]) == [None]
