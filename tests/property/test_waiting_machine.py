"""Random operations on the waiting queues, against a list that is searched for every question."""

from collections.abc import Hashable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.sequence import Sequence
from engine.waiting import QUEUES, FairQueue
from tests.fake_runner import request


class Naive:
    """The three policies by the book: nothing is ever forgotten, everything is recomputed."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.waiting: list[Sequence] = []
        self.counters: dict[bytes, float] = {}
        self.since: dict[Hashable, int] = {}  # tenant -> when it began to wait
        self.clock = 0

    def least(self) -> float:
        return min((self.counters[s.request.tenant] for s in self.waiting), default=0.0)

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        if not self.waiting:
            self.counters.clear()
        if all(s.request.tenant != tenant for s in self.waiting):
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), self.least())
            self.since[tenant] = self.clock
            self.clock += 1
        self.waiting.append(sequence)

    def charge(self, sequences: list[Sequence], known: dict[str, int]) -> None:
        least = self.least()
        for sequence in sequences:
            tenant = sequence.request.tenant
            before = max(self.counters.get(tenant, 0.0), least)
            self.counters[tenant] = before + known[sequence.id] / sequence.request.weight

    def head(self) -> Sequence | None:
        orders = {
            "fcfs": lambda s: s.arrival,
            "priority": lambda s: (s.request.priority, s.arrival),
            "fair": lambda s: (
                self.counters[s.request.tenant],
                self.since[s.request.tenant],
                s.arrival,
            ),
        }
        return min(self.waiting, key=orders[self.policy], default=None)


class Queues(RuleBasedStateMachine):
    """Arrivals, starts, tokens, preemptions and aborts."""

    @initialize(policy=st.sampled_from(sorted(QUEUES)))
    def start(self, policy: str) -> None:
        self.queue = QUEUES[policy]()
        self.naive = Naive(policy)
        self.running: list[Sequence] = []
        self.arrivals = 0

    @rule(
        priority=st.integers(-2, 2),
        tenant=st.integers(0, 3),
        length=st.integers(1, 9),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
    )
    def arrive(self, priority: int, tenant: int, length: int, weight: float) -> None:
        fields = {"priority": priority, "tenant": bytes([tenant]), "weight": weight}
        whole, _ = request(f"r{self.arrivals}", length, **fields)
        sequence = Sequence(whole, self.arrivals, 100)
        self.arrivals += 1
        if isinstance(self.queue, FairQueue):
            self.queue._most_counters = 0  # forget whatever can be forgotten, every time
        self.queue.push(sequence)
        self.naive.add(sequence)

    @precondition(lambda self: self.naive.waiting)
    @rule(cached=st.integers(0, 3))
    def take(self, cached: int) -> None:
        sequence = self.naive.head()
        assert sequence is not None
        sequence.num_computed = cached = min(cached, len(sequence.token_ids) - 1)
        due = len(sequence.token_ids) - max(sequence.num_charged, cached)
        self.queue.take(sequence)
        self.naive.charge([sequence], {sequence.id: due})
        self.naive.waiting.remove(sequence)
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        steps = st.lists(st.integers(0, 3), min_size=len(self.running), max_size=len(self.running))
        known = {}
        for sequence, count in zip(self.running, data.draw(steps), strict=True):
            sequence.token_ids += [1] * count
            known[sequence.id] = count
        self.queue.charge(self.running)
        self.naive.charge(self.running, known)

    @precondition(lambda self: self.running)
    @rule()
    def preempt(self) -> None:
        # The last of its line, as where the running ones are sorted by rank.
        sequence = max(self.running, key=lambda s: s.arrival)
        self.running.remove(sequence)
        sequence.rewind()
        self.queue.put_back(sequence)
        self.naive.add(sequence)

    @precondition(lambda self: self.naive.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.naive.waiting))
        self.queue.remove(sequence)
        self.naive.waiting.remove(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.running.remove(data.draw(st.sampled_from(self.running)))

    @invariant()
    def the_queue_agrees_with_the_list(self) -> None:
        if hasattr(self, "queue"):
            self.queue.check(self.running)
            assert len(self.queue) == len(self.naive.waiting)
            assert set(self.queue) == set(self.naive.waiting)
            assert self.queue.head() is self.naive.head()


Queues.TestCase.settings = settings(max_examples=200, stateful_step_count=50)
TestQueues = Queues.TestCase
