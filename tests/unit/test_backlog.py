"""What may wait, who is sent away, and for how long."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.pool import MediaStats
from server.backlog import UNKNOWN, WINDOW, Backlog, Place
from server.keys import Keys
from server.metrics import Metrics
from tests.fake_engine import FakeEngine
from wire.errors import TooManyRequests
from wire.settings import ServerSettings

A, B, C = b"a", b"b", b"c"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def backlog(
    requests: int = 10, tokens: int = 1000, *, fair: bool = False, clock: Clock | None = None
) -> Backlog:
    settings = ServerSettings(max_num_queued_reqs=requests, max_num_queued_tokens=tokens)
    return Backlog(
        settings, Metrics(FakeEngine(), MediaStats, Keys("")), fair=fair, clock=clock or Clock()
    )


def refusal(queue: Backlog, tenant: bytes, requests: int, tokens: int) -> TooManyRequests:
    with pytest.raises(TooManyRequests) as refused:
        queue.enter(tenant, requests, tokens)
    return refused.value


def test_what_fits_is_let_in_to_the_last_request_and_token() -> None:
    queue = backlog()
    queue.enter(A, 9, 400)
    assert refusal(queue, A, 2, 1).code == "queue_full_requests"
    assert refusal(queue, A, 1, 601).code == "queue_full_tokens"
    queue.enter(A, 1, 600)
    error = refusal(queue, A, 1, 1)
    assert (error.status, error.code) == (429, "queue_full_requests")


def test_what_is_larger_than_the_limits_is_let_in_where_nothing_waits() -> None:
    queue = backlog()
    place = queue.enter(A, 16, 5000)
    refusal(queue, A, 1, 1)
    place.leave()
    queue.enter(A, 1, 1)
    assert refusal(queue, A, 1, 5000).code == "queue_full_tokens"


def test_the_prompt_stops_waiting_with_the_first_choice_and_each_choice_with_its_own() -> None:
    queue = backlog(requests=3)
    place = queue.enter(A, 3, 1000)
    place.begin()
    queue.enter(A, 1, 1000)
    refusal(queue, A, 1, 0)
    place.begin()
    queue.enter(A, 1, 0)
    refusal(queue, A, 1, 0)
    place.begin()
    place.leave()
    queue.enter(A, 1, 0)
    refusal(queue, A, 1, 0)


def test_without_the_fair_policy_nobody_gets_more_than_the_limit() -> None:
    queue = backlog()
    queue.enter(A, 10, 10)
    refusal(queue, B, 1, 1)


def test_under_the_fair_policy_one_tenant_cannot_fill_the_queue_for_others() -> None:
    queue = backlog(fair=True)
    for _ in range(10):
        queue.enter(A, 1, 100)
    refusal(queue, A, 1, 1)
    for _ in range(5):  # half of ten, since two wait
        queue.enter(B, 1, 100)
    refusal(queue, B, 1, 0)
    queue.enter(C, 1, 900)  # nothing of C waits
    assert refusal(queue, C, 1, 1).code == "queue_full_tokens"
    assert refusal(queue, A, 1, 1).code == "queue_full_requests"


def test_under_the_fair_policy_the_tokens_of_a_tenant_are_bounded_as_its_requests() -> None:
    queue = backlog(requests=1000, fair=True)
    queue.enter(A, 1, 1000)
    queue.enter(B, 1, 400)
    assert refusal(queue, B, 1, 101).code == "queue_full_tokens"
    queue.enter(B, 1, 100)


def test_the_time_to_come_back_follows_the_rate_of_the_last_minute() -> None:
    clock = Clock()
    queue = backlog(requests=10, tokens=1000, clock=clock)
    places = [queue.enter(A, 1, 100) for _ in range(10)]
    assert refusal(queue, A, 1, 1).retry_after == UNKNOWN
    for place in places[:4]:  # one in two seconds
        place.begin()
        clock.now += 2
    queue.enter(A, 4, 0)
    assert refusal(queue, A, 3, 0).retry_after == 6
    assert refusal(queue, A, 16, 0).retry_after == 32
    assert refusal(queue, A, 1000, 0).retry_after == WINDOW
    queue = backlog(requests=100, tokens=1000, clock=clock)
    places = [queue.enter(A, 1, 100) for _ in range(10)]
    places[0].begin()
    clock.now += 1
    places[1].begin()
    assert refusal(queue, A, 1, 201).retry_after == 1
    assert refusal(queue, A, 1, 800).retry_after == 3
    clock.now += WINDOW + 1
    assert refusal(queue, A, 1, 800).retry_after == UNKNOWN


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "begin", "leave"]),
            st.sampled_from([A, B, C]),
            st.integers(1, 4),
            st.integers(1, 700),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_everything_is_given_back_and_the_excess_is_bounded(
    acts: list[tuple[str, bytes, int, int]], fair: bool
) -> None:
    queue = backlog(fair=fair)
    open_places: list[Place] = []
    for act, tenant, requests, tokens in acts:
        if act == "enter":
            with contextlib.suppress(TooManyRequests):
                open_places.append(queue.enter(tenant, requests, tokens))
        elif open_places:
            place = open_places[tokens % len(open_places)]
            if act == "begin" and place._requests:
                place.begin()
            elif act == "leave":
                place.leave()
                open_places.remove(place)
        excess = 1 + 1 / 2 + 1 / 3 if fair else 1
        assert queue._all["requests"] <= 10 * excess + 4 * 3 * fair
        assert queue._all["tokens"] <= 1000 * excess + 700 * 3 * fair
    for place in open_places:
        place.leave()
    assert not any(queue._all.values())
    assert not queue._tenants
