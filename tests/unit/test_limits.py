"""Limits of a key, on a clock that the test turns."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.limits import GUESS, Account, Bucket, KeyLimits, RateLimited, Spending, duration
from wire.errors import InvalidRequest


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def account(clock: Clock | None = None, **limits: int) -> Account:
    made = Account("key", clock=clock or Clock())
    made.limit(KeyLimits(**limits))
    return made


def refusal(of: Account) -> RateLimited:
    with pytest.raises(RateLimited) as refused, of.request():
        pass
    return refused.value


def spend(of: Account, prompt: int, answer: int | None = 0, visual: int = 0) -> Spending:
    fields = "messages", None if answer is None else "max_tokens"
    spending = Spending(of, prompt, visual, GUESS if answer is None else answer, fields)
    spending.begin()
    return spending


def ask(of: Account) -> None:
    with of.request():
        pass


@pytest.mark.parametrize("limit", [1, 7, 20, 60, 599, 12_345])
def test_a_full_bucket_lets_in_its_limit_and_then_one_whenever_it_is_there(limit: int) -> None:
    clock = Clock()
    key = account(clock, requests_per_minute=limit)
    for _ in range(limit):
        ask(key)
    for _ in range(50):
        error = refusal(key)
        assert error.retry_after == max(1, math.ceil(60 / limit))
        clock.now += 60 / limit  # to the moment
        ask(key)


@pytest.mark.parametrize("limit", [1, 7, 30, 59])
def test_retry_after_is_the_least_whole_number_of_seconds(limit: int) -> None:
    clock = Clock()
    key = account(clock, requests_per_minute=limit)
    for _ in range(limit):
        ask(key)
    seconds = refusal(key).retry_after
    assert seconds is not None
    start = clock.now
    clock.now = start + seconds - 1
    refusal(key)
    clock.now = start + seconds
    ask(key)


@given(
    limit=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=60),
)
def test_no_time_has_more_than_the_limit_and_what_was_filled_in(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = Bucket(limit, clock)
    taken: list[tuple[float, int]] = []
    for pause, amount in steps:
        clock.now += pause
        if not bucket.wait(amount):
            bucket.take(amount)
            taken.append((clock.now, amount))
        assert 0 <= bucket.remaining <= limit
        assert bucket.wait(bucket.remaining or 1) == 0 or bucket.remaining == 0
    for first, (began, _) in enumerate(taken):
        total = 0
        for now, amount in taken[first:]:
            total += amount
            assert total <= limit * (1 + (now - began) / 60) + 1e-3


@given(
    limit=st.integers(1, 500),
    steps=st.lists(
        st.tuples(
            st.floats(0, 30),  # seconds before
            st.integers(1, 200),  # tokens of the prompt
            st.integers(0, 200),  # and of the answer, at most
            st.floats(0, 1),  # how much of that there is
            st.integers(0, 5),  # how many others begin meanwhile
        ),
        max_size=40,
    ),
)
def test_tokens_used_in_any_time_are_within_the_limit_and_what_was_set_aside_before(
    limit: int, steps: list[tuple[float, int, int, float, int]]
) -> None:
    clock = Clock()
    key = account(clock, tokens_per_minute=limit)
    begun: list[tuple[float, int, int]] = []
    open_requests: list[tuple[int, Spending, int, int]] = []
    for number, (pause, prompt, answer, share, others) in enumerate(steps):
        clock.now += pause
        for due in [one for one in open_requests if one[0] <= number]:
            open_requests.remove(due)
            due[1].end(due[2])
        try:
            spending = spend(key, prompt, answer)
        except (RateLimited, InvalidRequest):
            continue
        used = int(answer * share)
        comes_back = sum(unused for _, _, _, unused in open_requests)
        begun.append((clock.now, prompt + used, comes_back))
        open_requests.append((number + others, spending, used, answer - used))
    for first, (since, _, comes_back) in enumerate(begun):
        total = 0
        for now, used, _ in begun[first:]:
            total += used
            assert total <= limit * (1 + (now - since) / 60) + comes_back + 1e-3


def test_a_refused_request_takes_nothing() -> None:
    clock = Clock()
    key = account(clock, requests_per_minute=2, tokens_per_minute=100)
    for _ in range(2):
        ask(key)
    for _ in range(10):
        refusal(key)
    clock.now += 30
    ask(key)
    spend(key, 60)
    with pytest.raises(RateLimited):
        spend(key, 60)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "40"
    assert (key.usage.requests, key.usage.refused, key.usage.prompt_tokens) == (3, 11, 60)


def test_requests_at_once_are_counted_until_they_end_however_they_end() -> None:
    key = account(max_concurrent_requests=2)
    with contextlib.suppress(ZeroDivisionError), key.request(), key.request():
        error = refusal(key)
        assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
        assert error.retry_after == 1
        raise ZeroDivisionError
    assert key.running == 0
    ask(key)


def test_tokens_are_taken_as_asked_for_and_corrected_at_the_end() -> None:
    clock = Clock()
    key = account(clock, tokens_per_minute=1000)
    spending = spend(key, 300, 500)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "200"
    with pytest.raises(RateLimited) as refused:
        spend(key, 250)
    assert refused.value.type == "tokens"
    assert refused.value.retry_after == 3
    spending.end(100)
    spending.end(100)  # once is enough
    assert key.headers()["x-ratelimit-remaining-tokens"] == "600"
    assert key.usage.completion_tokens == 100


def test_an_answer_of_unknown_length_is_guessed_and_may_leave_a_debt() -> None:
    clock = Clock()
    key = account(clock, tokens_per_minute=600)
    spending = spend(key, 100, None)
    assert key.headers()["x-ratelimit-remaining-tokens"] == str(600 - 100 - GUESS)
    spending.end(1000)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert key.headers()["x-ratelimit-reset-tokens"] == "1m50s"  # 1100 of 600 a minute
    assert refusal(key).retry_after == 51  # 500 owed, and one
    clock.now += 50.1
    ask(key)


def test_a_guess_never_keeps_a_prompt_out_that_fits() -> None:
    spend(account(tokens_per_minute=100), 99, None)
    with pytest.raises(InvalidRequest):
        spend(account(tokens_per_minute=100), 100, None)


@pytest.mark.parametrize(
    ("limits", "spent", "param", "says"),
    [
        ({"tokens_per_minute": 100}, (101, 0, 64), "messages", ("101", "64", "100 a minute")),
        ({"tokens_per_minute": 100}, (50, 51, 0), "max_tokens", ("101 tokens", "51 for the")),
        ({"visual_tokens_per_minute": 63}, (80, 9, 64), "messages", ("64 visual", "63 a minute")),
    ],
)
def test_what_never_fits_is_told_so_and_not_to_come_back(
    limits: dict[str, int], spent: tuple[int, int, int], param: str, says: tuple[str, ...]
) -> None:
    key = account(**limits)
    with pytest.raises(InvalidRequest) as refused:
        spend(key, *spent)
    error = refused.value
    assert (error.status, error.code) == (400, "request_exceeds_rate_limit")
    assert error.param == param
    assert error.retry_after is None
    assert all(word in error.message for word in says)
    assert key.headers()[f"x-ratelimit-remaining-{next(iter(key._buckets))}"] == str(
        next(iter(limits.values()))
    )


def test_one_limit_that_refuses_leaves_the_others_untouched() -> None:
    key = account(tokens_per_minute=1000, visual_tokens_per_minute=100)
    spend(key, 200, 0, 80)
    with pytest.raises(RateLimited) as refused:
        spend(key, 200, 0, 40)
    assert refused.value.type == "tokens"
    assert "visual tokens" in refused.value.message
    assert key.headers()["x-ratelimit-remaining-tokens"] == "800"
    assert key.headers()["x-ratelimit-remaining-visual-tokens"] == "20"


def test_other_limits_keep_the_share_that_is_used() -> None:
    clock = Clock()
    key = account(clock, requests_per_minute=10)
    for _ in range(5):
        ask(key)
    key.limit(KeyLimits(requests_per_minute=100, tokens_per_minute=50))
    assert key.headers()["x-ratelimit-remaining-requests"] == "50"
    assert key.headers()["x-ratelimit-remaining-tokens"] == "50"
    key.limit(KeyLimits())
    assert not key.headers()


def test_a_limit_that_comes_while_a_request_runs_is_not_charged_for_it() -> None:
    key = account()
    spending = spend(key, 300, 500)
    key.limit(KeyLimits(tokens_per_minute=1000))
    spending.end(100)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "1000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3661.5, "1h1m1.5s"),
        (7200, "2h0m0s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
