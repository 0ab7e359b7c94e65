"""Who is served when, under each scheduling policy."""

import math
from collections import Counter

import msgspec
import pytest

from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.waiting import FairQueue, PriorityQueue
from tests.fake_runner import Engine, alone, request

FLOOD, OTHER = b"flood", b"other"


def ids(plan: StepPlan) -> list[str]:
    return [work.id for work in plan.work]


def starts(engine: Engine) -> list[str]:
    return [new.id for plan in engine.runner.plans for new in plan.new_rows]


# First come, first served


def test_first_come_first_served_heeds_neither_priority_nor_tenant() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("a", 4, priority=9, tenant=FLOOD)
    engine.add("b", 4, priority=9, tenant=FLOOD)
    engine.add("c", 4, priority=-9, tenant=OTHER, weight=100.0)
    engine.finish()
    assert starts(engine) == ["a", "b", "c"]


# Priority


def test_the_least_priority_starts_first_and_of_equal_ones_the_first_that_came() -> None:
    engine = Engine(scheduling_policy="priority", max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)):
        engine.add(name, 4, priority=priority)
    engine.finish()
    assert starts(engine) == ["c", "a", "e", "b", "d"]


@pytest.mark.parametrize("pipelined", ["on", "off"])
def test_a_better_one_takes_the_place_of_the_worst_that_runs(pipelined: str) -> None:
    engine = Engine(scheduling_policy="priority", max_num_seqs=2, async_scheduling=pipelined)
    engine.add("worst", 4, max_tokens=20, priority=2)
    engine.add("middle", 4, max_tokens=20, priority=1, seed=1)
    engine.step()
    engine.step()
    engine.add("best", 4, max_tokens=4, priority=0, seed=2)
    engine.add("same", 4, max_tokens=4, priority=1, seed=3)
    engine.finish()
    assert starts(engine) == ["middle", "worst", "best", "same", "worst"]
    assert engine.scheduler.stats.preemptions == 1
    assert engine.tokens["worst"] == alone(4, max_tokens=20)


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_the_other_policies_preempt_nobody_for_one_that_waits(policy: str) -> None:
    engine = Engine(scheduling_policy=policy, max_num_seqs=1)
    engine.add("a", 4, max_tokens=30, priority=9, tenant=FLOOD)
    engine.step()
    engine.add("b", 4, max_tokens=2, priority=0, tenant=OTHER)
    engine.finish()
    assert starts(engine) == ["a", "b"]
    assert not engine.scheduler.stats.preemptions


@pytest.mark.parametrize("pipelined", ["on", "off"])
def test_a_better_one_takes_the_blocks_of_as_many_as_it_needs_and_no_more(pipelined: str) -> None:
    engine = Engine(
        scheduling_policy="priority",
        num_kv_blocks=17,
        enable_prefix_caching=False,
        async_scheduling=pipelined,
    )
    for seed, name in enumerate("abcd"):
        engine.add(name, 14, max_tokens=2, priority=1, seed=seed)  # four blocks each
    engine.step()
    assert engine.scheduler.stats.running == 4
    engine.add("best", 20, max_tokens=2, priority=0, seed=9)  # five blocks
    assert engine.step().preempted == ["d", "c"]
    engine.finish()
    assert starts(engine)[4] == "best"
    for seed, name in enumerate("abcd"):
        assert engine.tokens[name] == alone(14, max_tokens=2, seed=seed)


def test_nobody_is_preempted_where_that_does_not_make_enough_room() -> None:
    engine = Engine(
        scheduling_policy="priority",
        num_kv_blocks=17,
        max_model_len=68,
        enable_prefix_caching=False,
    )
    engine.add("better", 30, max_tokens=9, priority=0)
    engine.add("worse", 14, max_tokens=9, priority=2, seed=1)
    engine.step()
    engine.add("large", 50, max_tokens=2, priority=1, seed=2)
    engine.finish()
    assert starts(engine) == ["better", "worse", "large"]
    assert not engine.scheduler.stats.preemptions


def test_the_worst_priority_is_the_first_to_lose_its_blocks() -> None:
    engine = Engine(scheduling_policy="priority", num_kv_blocks=7)
    for seed, (name, priority) in enumerate((("a", 1), ("b", 2), ("c", 0))):
        engine.add(name, 7, max_tokens=8, seed=seed, priority=priority)
    while not engine.scheduler.stats.preemptions:
        plan = engine.step()
    assert plan.preempted == ["b"]
    engine.finish()
    for seed, name in enumerate("abc"):
        assert engine.tokens[name] == alone(7, max_tokens=8, seed=seed)


# Fair


@pytest.mark.parametrize("pipelined", ["on", "off"])
def test_who_asks_one_at_a_time_waits_for_few_of_fifty_that_another_sent(pipelined: str) -> None:
    engine = Engine(
        scheduling_policy="fair", max_num_seqs=4, num_kv_blocks=512, async_scheduling=pipelined
    )
    for number in range(50):
        engine.add(f"flood-{number}", 20, max_tokens=12, seed=number, tenant=FLOOD)
    for _ in range(5):
        engine.step()
    for number in range(6):
        before = len(starts(engine))
        name = f"other-{number}"
        engine.add(name, 6, max_tokens=3, seed=number, tenant=OTHER)
        while name not in engine.ends:
            engine.step()
        overtaken_by = starts(engine)[before:].index(name)
        # One has been taken before the other's turn comes, and each place is free at most once.
        assert overtaken_by <= 2
    assert sum(name.startswith("flood") for name in engine.ends) < 40
    engine.finish()


def served(engine: Engine) -> Counter[bytes]:
    """Positions computed for each tenant, by the first letter of its requests."""
    counts: Counter[bytes] = Counter()
    for plan in engine.runner.plans:
        for work in plan.work:
            counts[work.id[:1].encode()] += work.count
    return counts


def test_weights_one_to_three_share_the_tokens_one_to_three() -> None:
    engine = Engine(
        scheduling_policy="fair",
        max_num_seqs=4,
        num_kv_blocks=512,
        enable_prefix_caching=False,
    )
    for number in range(300):
        engine.add(f"a{number}", 5 + number % 17, max_tokens=8, seed=number, tenant=b"a")
        name, length = f"b{number}", 3 + number % 23
        engine.add(name, length, max_tokens=8, seed=number, tenant=b"b", weight=3.0)
    while served(engine).total() < 4000:
        engine.step()
    waiting = Counter(sequence.request.tenant for sequence in engine.scheduler._waiting)
    assert min(waiting.values()) > 20  # both wanted more all the time
    counts = served(engine)
    # Off by at most what four sequences that run are charged ahead: 4 x (25 + 8) tokens.
    assert counts[b"b"] == pytest.approx(3 * counts[b"a"], abs=3 * 4 * (25 + 8))
    assert counts[b"b"] / counts[b"a"] == pytest.approx(3, rel=0.1)


def test_an_idle_tenant_saves_nothing_up() -> None:
    engine = Engine(scheduling_policy="fair", max_num_seqs=1, enable_prefix_caching=False)
    for number in range(40):
        engine.add(f"a{number}", 8, max_tokens=4, seed=number, tenant=b"a")
    while len(engine.ends) < 20:
        engine.step()
    for number in range(40):
        engine.add(f"b{number}", 8, max_tokens=4, seed=number, tenant=b"b")
    begun = len(starts(engine))
    while len(starts(engine)) < begun + 20:
        engine.step()
    turns = "".join(name[0] for name in starts(engine)[begun:])
    assert turns.count("a") == turns.count("b")
    assert "bbb" not in turns
    engine.finish()


def test_generated_tokens_count() -> None:
    engine = Engine(scheduling_policy="fair", max_num_seqs=1, num_kv_blocks=512)
    for number in range(30):
        engine.add(f"a{number}", 2, max_tokens=30, seed=number, tenant=b"a")
        engine.add(f"b{number}", 2, max_tokens=2, seed=number, tenant=b"b")
    while len(engine.ends) < 30:
        engine.step()
    ended = Counter(name[0] for name in engine.ends)
    assert ended["b"] > 5 * ended["a"]


def test_pictures_count_and_cached_tokens_do_not() -> None:
    """Two tenants with like texts; the prompts of one hold a picture, or are found."""
    engine = Engine(scheduling_policy="fair", max_num_seqs=1, num_kv_blocks=512)
    for number in range(30):
        engine.add(f"a{number}", number + 1, (number, 5), max_tokens=1, seed=number, tenant=b"a")
        engine.add(f"b{number}", number + 1, max_tokens=1, seed=number, tenant=b"b")
    while len(engine.ends) < 30:
        engine.step()
    ended = Counter(name[0] for name in engine.ends)
    assert ended["b"] > 1.5 * ended["a"]
    engine.finish()

    engine = Engine(scheduling_policy="fair", max_num_seqs=1, num_kv_blocks=512)
    engine.add("known", 41, max_tokens=1, tenant=b"c")
    engine.finish()
    for number in range(30):
        engine.add(f"a{number}", 41, max_tokens=1, tenant=b"a")  # 40 of 41 are found
        engine.add(f"b{number}", 41, max_tokens=1, seed=number + 1, tenant=b"b")
    while len(engine.ends) < 31:
        engine.step()
    ended = Counter(name[0] for name in engine.ends)
    assert ended["a"] > 10 * ended["b"]
    engine.finish()


def test_what_an_engine_that_died_had_computed_is_not_charged_again() -> None:
    queue = FairQueue()
    fresh, _ = request("fresh", 50, tenant=b"a")
    resumed = msgspec.structs.replace(fresh, id="resumed", output=[1, 2], tenant=b"b")
    blocker, _ = request("blocker", 1, tenant=b"c")
    first, second, third = (
        Sequence(each, number, 100) for number, each in enumerate((fresh, resumed, blocker))
    )
    for sequence in (first, second, third):
        queue.push(sequence)
    queue.take(first)
    queue.take(second)
    second.token_ids += [3, 4]
    queue.charge([first, second])
    assert queue._counters == {b"a": 50, b"b": 2, b"c": 0}


def test_tenants_and_priorities_that_come_and_go_leave_nothing_behind() -> None:
    fair, ranked = FairQueue(), PriorityQueue()
    for queue in (fair, ranked):
        staying, _ = request("staying", 1, tenant=b"staying", priority=-1)
        queue.push(Sequence(staying, 0, 10))
        for number in range(1, 10_000):
            passing, _ = request("passing", 1, tenant=b"%d" % number, priority=number)
            sequence = Sequence(passing, number, 10)
            queue.push(sequence)
            queue.remove(sequence)
        queue.check()
        assert len(queue._heap) < 20
    assert len(fair._counters) < 40


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_cannot_be_divided_by_ends_with_an_error(weight: float) -> None:
    engine = Engine(scheduling_policy="fair")
    engine.add("a", 3, weight=weight)
    engine.finish()
    assert engine.ends["a"].finish_reason == "error"
