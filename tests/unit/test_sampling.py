"""Sampling: what the filters keep, and that a draw is fixed by logits, seed and position."""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling import FILTERS, SHAPING
from engine.sampling.base import SampleRow, Step
from engine.sampling.filters import MinP, Temperature, TopK, TopP
from engine.sampling.logprobs import Part, logprobs, score
from engine.sampling.noise import exponentials, key
from engine.sampling.sampler import sample
from engine.sampling.shaping import MinTokens
from wire.sampling import MAX_SEED, SamplingParams

NEUTRAL = SamplingParams()


def at(params: SamplingParams, position: int) -> SampleRow:
    """A row that has generated ``position`` tokens."""
    return SampleRow(params, np.zeros(0, np.int64), np.zeros(position, np.int64))


def draw(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int | None]:
    tokens = sample(logits, [at(p, n) for p, n in zip(params, positions, strict=True)])
    return [None if token < 0 else token for token in tokens.tolist()]


def rows(count: int, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def kept(step: Step, logits: Tensor, **values: float) -> list[int]:
    row = at(msgspec.structs.replace(NEUTRAL, **values), 0)
    assert step.needed(row)
    return step.apply(logits[None], [row])[0].isfinite().nonzero()[:, 0].tolist()


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("p", "tokens"), [(0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_tokens_until_their_sum_reaches_it(p: float, tokens: list[int]) -> None:
    assert kept(TopP(), PROBABILITIES.log(), top_p=p) == tokens


def test_top_p_keeps_one_token_however_small() -> None:
    assert kept(TopP(), PROBABILITIES.log(), top_p=1e-9) == [1]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])  # 0.01: thousands of tokens reach 0.9
def test_top_p_over_a_large_vocabulary_keeps_what_a_sorted_sum_keeps(spread: float) -> None:
    logits = rows(3, vocab=7001) * spread
    for row, p in zip(logits, (0.3, 0.9, 0.999), strict=True):
        likely = row.double().softmax(-1).sort(descending=True)
        count = int((likely.values.cumsum(-1) - likely.values < p).sum())
        assert kept(TopP(), row, top_p=p) == sorted(likely.indices[:count].tolist())


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
    shares = Temperature().apply(logits, [at(params, 0)]).softmax(-1)
    assert shares.isfinite().all()
    assert shares.argmax() == logits.argmax()
    if temperature >= 0.5:
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1))


def test_filters_apply_in_their_order() -> None:
    assert [type(step) for step in FILTERS] == [Temperature, TopK, TopP, MinP]


@pytest.mark.parametrize("step", [*SHAPING, *FILTERS], ids=lambda step: type(step).__name__)
def test_neutral_values_need_no_step(step: Step) -> None:
    assert not step.needed(at(NEUTRAL, 3))


def test_rows_are_filtered_by_their_own_values() -> None:
    logits = PROBABILITIES.log().repeat(3, 1)
    params = [
        SamplingParams(top_k=2, seed=1),
        SamplingParams(top_p=0.3, seed=1),
        SamplingParams(seed=1),
    ]
    drawn: list[set[int | None]] = [set(), set(), set()]
    for position in range(300):
        for seen, token in zip(drawn, draw(logits, params, [position] * 3), strict=True):
            seen.add(token)
    assert drawn == [{1, 3}, {1}, {0, 1, 2, 3, 4}]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_k=1)])
def test_greedy_takes_the_likeliest_whatever_the_seed(params: SamplingParams) -> None:
    logits = rows(20)
    for seed in (0, 1):
        seeded = [msgspec.structs.replace(params, seed=seed)] * 20
        assert draw(logits, seeded, [0] * 20) == logits.argmax(-1).tolist()


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits = rows(12)
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m, seed=k)
        for t, p, k, m in [(1.0, 1.0, 0, 0.0), (0.7, 0.9, 0, 0.0), (1.5, 1.0, 9, 0.0)] * 4
        for _ in (0,)
    ]
    positions = list(range(12))
    together = draw(logits, params, positions)
    alone = [draw(logits[i : i + 1], params[i : i + 1], [i])[0] for i in range(12)]
    order = list(reversed(range(12)))
    turned = draw(logits[order], [params[i] for i in order], order)
    assert together == alone == list(reversed(turned))


def test_a_draw_depends_on_seed_and_position() -> None:
    logits = torch.zeros(1, 1000)
    draws = {
        (seed, position): draw(logits, [SamplingParams(seed=seed)], [position])[0]
        for seed in range(10)
        for position in range(10)
    }
    assert len(set(draws.values())) > 80
    assert draws == {key: draw(logits, [SamplingParams(seed=key[0])], [key[1]])[0] for key in draws}


def test_draws_follow_the_probabilities() -> None:
    count = 20_000
    logits = PROBABILITIES.log().repeat(count, 1)
    tokens = draw(logits, [NEUTRAL] * count, list(range(count)))
    found = torch.bincount(torch.tensor(tokens), minlength=5) / count
    # Four standard deviations of the likeliest token's share.
    assert (found - PROBABILITIES).abs().max() < 4 * math.sqrt(0.25 / count)


def mixed(x: int) -> int:
    """lowbias32, in integers without an end."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def exponential(seed: int, position: int, token: int) -> float:
    first, second = (part % 2**32 for part in key(seed, position))
    bits = mixed(mixed(token * 0x9E3779B9 % 2**32 ^ first) ^ second) % 2**31
    return -math.log1p(-(bits + 0.5) / 2**31)


@pytest.mark.parametrize("vocab", [1, 50, 1300])
def test_a_draw_is_the_winner_of_an_exponential_race(vocab: int) -> None:
    logits = rows(20, vocab)
    logits[:, 1::3] = -torch.inf
    drawn = draw(logits, [SamplingParams(seed=n) for n in range(20)], list(range(20)))
    for seed, (row, token) in enumerate(zip(logits.tolist(), drawn, strict=True)):
        times = [
            exponential(seed, seed, i) / math.exp(row[i])
            for i in range(0, vocab, 1)
            if row[i] > -math.inf
        ]
        possible = [i for i in range(vocab) if row[i] > -math.inf]
        assert token == possible[times.index(min(times))]


@given(st.integers(-MAX_SEED - 1, MAX_SEED), st.integers(0, 2**40))
def test_the_numbers_of_a_draw_are_exponential_and_finite(seed: int, position: int) -> None:
    numbers = exponentials(torch.tensor([key(seed, position)], dtype=torch.int32), 4000)[0]
    assert numbers.min() > 0
    assert numbers.max() < torch.inf
    assert numbers.unique().numel() > 3990
    # Six standard deviations of 4,000: of the mean, and of the share below the median.
    assert abs(numbers.mean().item() - 1) < 0.095
    assert abs((numbers < math.log(2)).float().mean().item() - 0.5) < 0.048


def test_draws_of_neighbours_are_independent() -> None:
    """Neither the next seed nor the next position, nor the next token, says anything."""
    keys = [key(seed, position) for seed in range(40) for position in range(40)]
    numbers = exponentials(torch.tensor(keys, dtype=torch.int32), 200).view(40, 40, 200).double()
    for one, other in (
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers[..., 1:], numbers[..., :-1]),
    ):
        both = torch.stack([one.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 6 / both.shape[1] ** 0.5


def test_rounding_changes_next_to_no_draw() -> None:
    """What another batch does to logits, a hundred times over."""
    logits = rows(2000, 1152)
    params = [SamplingParams(seed=n) for n in range(2000)]
    touched = logits + (rows(2000, 1152, seed=1) / 3) * 1e-3
    before, after = (draw(given, params, [0] * 2000) for given in (logits, touched))
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 6


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((500, 9), -1e30)  # finite, and still impossible
    logits[:, 3:6] = torch.tensor([0.0, 1.0, 2.0])
    assert set(draw(logits, [NEUTRAL] * 500, list(range(500)))) == {3, 4, 5}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [NEUTRAL, SamplingParams(temperature=0.0)])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others(
    bad: float, params: SamplingParams
) -> None:
    logits = rows(3)
    expected = draw(logits, [params] * 3, [0, 1, 2])
    logits[1, 17] = bad
    assert draw(logits, [params] * 3, [0, 1, 2]) == [expected[0], None, expected[2]]
    assert draw(logits[1:2], [params], [0]) == [None]


# What changes the likeliest token


def reference(processor: object, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """transformers' processors take ids [B, L] and scores [B, V]."""
    return processor(torch.tensor([list(tokens)]), logits.clone())  # type: ignore[operator]


PROMPT, OUTPUT = (3, 7, 7, 40), (5, 7, 5, 5, 2)


def shaped(prompt: Sequence[int] = PROMPT, output: Sequence[int] = OUTPUT, **values: Any) -> Tensor:
    """Random logits ``[1, 50]`` after the one shaping step that the values ask for."""
    row = SampleRow(
        msgspec.structs.replace(NEUTRAL, **values), np.array(prompt), np.array(output, np.int64)
    )
    needed = [step for step in SHAPING if step.needed(row)]
    assert len(needed) == 1
    before = rows(1)
    after = needed[0].apply(before, [row])
    assert torch.equal(before, rows(1)), "a step must not change its input"
    return after


@pytest.mark.parametrize(
    ("values", "warpers"),
    [
        ({"top_k": 1000}, [TopKLogitsWarper(1000)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.05}, [TopPLogitsWarper(0.05)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"min_p": 0.02}, [MinPLogitsWarper(0.02)]),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        (
            {"temperature": 1.7, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
            [
                TemperatureLogitsWarper(1.7),
                TopKLogitsWarper(30),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_filters_equal_transformers_warpers(
    values: dict[str, float], warpers: list[object]
) -> None:
    """The same tokens stay, with the same probabilities."""
    row = at(msgspec.structs.replace(NEUTRAL, **values), 0)
    for seed in range(20):
        logits = rows(1, vocab=400, seed=seed)
        expected = logits
        for warper in warpers:
            expected = reference(warper, [0], expected)
        found = logits
        for step in FILTERS:
            if step.needed(row):
                found = step.apply(found, [row])
        assert torch.equal(found.isneginf(), expected.isneginf())
        torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    expected = reference(RepetitionPenaltyLogitsProcessor(penalty), PROMPT + OUTPUT, rows(1))
    torch.testing.assert_close(shaped(repetition_penalty=penalty), expected)


def test_bad_words_equal_transformers() -> None:
    words = ((9,), (5, 2, 11), (2, 12), (5, 13), (1, 2, 14), (40, 5, 7, 5, 5, 2, 15))
    processor = NoBadWordsLogitsProcessor([list(w) for w in words], eos_token_id=49)
    expected = reference(processor, OUTPUT, rows(1))
    after = shaped(bad_words=words)
    assert torch.equal(after, expected)
    assert after.isneginf().nonzero()[:, 1].tolist() == [9, 11, 12]


@pytest.mark.parametrize(("position", "banned"), [(0, [4, 6]), (2, [4, 6]), (3, [])])
def test_stop_tokens_wait_for_min_tokens(position: int, banned: list[int]) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(4, 6))
    row = at(params, position)
    (step,) = [step for step in SHAPING if isinstance(step, MinTokens)]
    assert step.needed(row) == bool(banned)
    if banned:
        processor = MinNewTokensLengthLogitsProcessor(0, 3, [4, 6])
        expected = reference(processor, [0] * position, rows(1))
        assert torch.equal(step.apply(rows(1), [row]), expected)


@given(
    st.lists(st.integers(0, 49), min_size=1, max_size=30),
    st.floats(-2, 2).filter(bool),
    st.floats(-2, 2),
)
def test_presence_and_frequency_follow_the_formula_of_the_api(
    output: list[int], presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, of the output alone."""
    after = shaped(output=output, presence_penalty=presence, frequency_penalty=frequency)
    for token, before in enumerate(rows(1)[0].tolist()):
        count = output.count(token)
        expected = before - count * frequency - (count > 0) * presence
        assert after[0, token].item() == pytest.approx(expected, abs=1e-4)


def test_bias_is_added_and_the_allowed_alone_stay() -> None:
    biased = shaped(logit_bias=((4, 2.5), (6, -100.0)))
    difference = (biased - rows(1))[0]
    assert difference.nonzero()[:, 0].tolist() == [4, 6]
    torch.testing.assert_close(difference[[4, 6]], torch.tensor([2.5, -100.0]))
    allowed = shaped(allowed_token_ids=(8, 3))
    assert allowed.isfinite().nonzero()[:, 1].tolist() == [3, 8]
    assert torch.equal(allowed[0, [3, 8]], rows(1)[0, [3, 8]])


def test_shaping_holds_for_greedy_rows_and_for_no_others() -> None:
    logits = rows(3)
    best = logits.argmax(-1).tolist()
    greedy = SamplingParams(temperature=0.0)
    banning = msgspec.structs.replace(greedy, bad_words=((best[1],),))
    first, second, third = draw(logits, [greedy, banning, greedy], [0, 0, 0])
    assert (first, third) == (best[0], best[2])
    assert second == logits[1].topk(2).indices[1]


def test_a_row_with_nothing_left_gives_no_token_and_leaves_the_others() -> None:
    logits = rows(2)
    stuck = SamplingParams(temperature=0.0, allowed_token_ids=(4,), bad_words=((4,),))
    assert draw(logits, [stuck, SamplingParams(temperature=0.0)], [0, 0]) == [
        None,
        logits[1].argmax().item(),
    ]


def test_logprobs_are_the_models_own_for_the_rows_that_ask() -> None:
    logits = rows(4)
    counts = (2, -1, 0, 20)
    asking = [at(SamplingParams(logprobs=n, temperature=0.3, top_k=1), 0) for n in counts]
    expected = torch.log_softmax(logits.double(), -1)
    likely = logprobs(logits, torch.tensor([5, 6, 7, -1]), asking)
    assert likely is not None
    found = likely.read(4)
    assert found[1] is None
    for row, token in ((0, 5), (2, 7)):
        entry = found[row]
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
        assert len(entry.top) == counts[row]
        best = expected[row].topk(counts[row]) if counts[row] else None
        if best is not None:
            assert [name for name, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-5
            )


def test_scores_are_looked_up_in_pieces_and_ties_count_as_likely() -> None:
    hidden = rows(150, vocab=30)
    hidden[:, 11] = hidden[:, 12]
    tokens = torch.arange(150) % 30
    expected = hidden.double().log_softmax(-1)
    first, second, third = score(
        lambda part: part, hidden, tokens, [Part(1, 0), Part(100, 3), Part(49, 2)]
    ).read()
    assert [len(first), len(second), len(third)] == [1, 100, 49]
    for at_row, entry in enumerate([*first, *second, *third]):
        row, token = expected[at_row], int(tokens[at_row])
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert entry.rank == (row >= row[token]).sum()
        best = row.topk(len(entry.top)).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-5)
    assert {len(entry.top) for entry in first} == {0}
    assert {len(entry.top) for entry in second} == {3}
    assert {len(entry.top) for entry in third} == {2}
