"""The waiting queue: who starts next. One class for each value of ``--scheduling-policy``.

All three keep the sequences that wait in lines, each in order of arrival, and take the first one
of the best line. A policy decides which lines there are and which is the best: one line for all
(fcfs), one per priority, or one per tenant, in order of what each has been served (fair).

Every operation costs O(log n) for n lines, amortised. The heap of lines is corrected late: an
entry is checked against its line when it comes to the top, and all are rebuilt when most of them
are of lines that are gone.
"""

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from engine.sequence import Sequence


class _Line:
    """The sequences that wait under one key, in order of arrival; never empty while it is one."""

    __slots__ = ("key", "number", "sequences")

    def __init__(self, key: Hashable, number: int) -> None:
        self.key = key
        self.number = number
        self.sequences: OrderedDict[str, Sequence] = OrderedDict()


class WaitingQueue:
    """First come, first served; the other policies put other lines in its place."""

    preempts = False
    """Whether a sequence that waits may take the place of one that runs; see ``outranks``."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line] = {}
        # (order, number, line): every line has an entry whose order is not above its own.
        self._heap: list[tuple[float, int, _Line]] = []
        self._numbers = 0
        self._size = 0

    def _key(self, sequence: Sequence) -> Hashable:
        """The line that a sequence stands in."""
        return None

    def _order(self, key: Hashable) -> float:
        """The line with the least goes first, of equal ones the oldest. Never decreases."""
        return 0

    def rank(self, sequence: Sequence) -> Any:
        """Running sequences are sorted by this, equal ones by when they were taken."""
        return sequence.arrival

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """Everything that waits, line by line."""
        for line in self._lines.values():
            yield from line.sequences.values()

    def push(self, sequence: Sequence) -> None:
        """Add one that has arrived: the last of its line."""
        self._line(self._key(sequence)).sequences[sequence.id] = sequence
        self._size += 1

    def put_back(self, sequence: Sequence) -> None:
        """Add one that was preempted: of its line, whatever waits arrived after it."""
        self.push(sequence)
        self._lines[self._key(sequence)].sequences.move_to_end(sequence.id, last=False)

    def head(self) -> Sequence | None:
        """The one that is to start next."""
        line = self._best()
        return None if line is None else next(iter(line.sequences.values()))

    def take(self, sequence: Sequence) -> None:
        """Remove the head, because it starts; ``num_computed`` of its tokens were found cached."""
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove one from wherever it stands."""
        line = self._lines[self._key(sequence)]
        del line.sequences[sequence.id]
        self._size -= 1
        if not line.sequences:
            del self._lines[line.key]
            if len(self._heap) > 2 * len(self._lines) + 8:
                self._heap = [
                    (self._order(k), each.number, each) for k, each in self._lines.items()
                ]
                heapq.heapify(self._heap)

    def outranks(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether ``running`` should make room for ``waiting``."""
        return self.preempts and self._order(self._key(waiting)) < self._order(self._key(running))

    def charge(self, sequences: Iterable[Sequence]) -> None:
        """Take note of what was computed of sequences that run; most policies do not care."""

    def _line(self, key: Hashable) -> _Line:
        line = self._lines.get(key)
        if line is None:
            self._activate(key)
            line = self._lines[key] = _Line(key, self._numbers)
            heapq.heappush(self._heap, (self._order(key), line.number, line))
            self._numbers += 1
        return line

    def _activate(self, key: Hashable) -> None:
        """A line is about to begin."""

    def _best(self) -> _Line | None:
        heap = self._heap
        while heap:
            order, number, line = heap[0]
            if not line.sequences:
                heapq.heappop(heap)
            elif (current := self._order(line.key)) == order:
                return line
            else:
                heapq.heapreplace(heap, (current, number, line))
        return None

    def check(self, running: Iterable[Sequence] = ()) -> None:
        """Raise AssertionError where the queue contradicts itself or what runs."""
        assert self._size == sum(len(line.sequences) for line in self._lines.values())
        for key, line in self._lines.items():
            arrivals = [sequence.arrival for sequence in line.sequences.values()]
            assert arrivals, "a line is empty"
            assert arrivals == sorted(arrivals), "a later sequence has overtaken an earlier one"
            assert all(self._key(sequence) == key for sequence in line.sequences.values())
        assert len(self._heap) <= 2 * len(self._lines) + 8
        for sequence in running:
            behind = self._lines.get(self._key(sequence))
            if behind is not None:
                first = next(iter(behind.sequences.values()))
                assert sequence.arrival < first.arrival, "a later sequence has overtaken an earlier"


class PriorityQueue(WaitingQueue):
    """The least ``priority`` first, then first come, first served.

    Nothing ages: as long as better ones keep coming, a sequence waits. One that waits takes the
    place of the worst that run where that gives it the room it lacks.
    """

    preempts = True

    def _key(self, sequence: Sequence) -> int:
        return sequence.request.priority

    def _order(self, key: Hashable) -> float:
        assert isinstance(key, int)
        return key

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """Running sequences stand in the order in which they would be taken."""
        return sequence.request.priority, sequence.arrival


class FairQueue(WaitingQueue):
    """The tenant that was served least goes first; the virtual token counter of Sheng et al.,
    "Fairness in Serving Large Language Models" (OSDI 2024).

    Service is counted in positions computed, divided by the tenant's weight: prompt tokens,
    pictures' included, that were not found cached, when the sequence starts; generated tokens as
    they come. No position is charged twice: neither what preemption has computed again, nor what
    the engine before this one, which died, had generated of a request.

    Nobody saves up: a tenant with nothing waiting has at least the least counter of those that
    wait. While nobody waits nobody is owed anything, so all counters start again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counters: dict[Hashable, float] = {}
        self._most_counters = 16

    def _key(self, sequence: Sequence) -> Hashable:
        return sequence.request.tenant

    def _order(self, key: Hashable) -> float:
        return self._counters[key]

    def rank(self, sequence: Sequence) -> int:
        """Running sequences stand in the order in which they were taken."""
        return 0

    def take(self, sequence: Sequence) -> None:
        """Remove the head and charge its prompt, so that the next head is chosen knowing of it."""
        sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
        self.charge((sequence,))
        super().take(sequence)

    def charge(self, sequences: Iterable[Sequence]) -> None:
        """Charge what is known of each sequence and was not charged before."""
        best, counters = self._best(), self._counters
        least = 0.0 if best is None else counters[best.key]
        for sequence in sequences:
            known = len(sequence.token_ids)
            due = known - sequence.num_charged
            if due:
                sequence.num_charged = known
                request = sequence.request
                count = counters.get(request.tenant, least)
                counters[request.tenant] = (
                    count if count > least else least
                ) + due / request.weight

    def _activate(self, key: Hashable) -> None:
        best, counters = self._best(), self._counters
        if best is None:
            counters.clear()
        least = 0.0 if best is None else counters[best.key]
        counters[key] = max(counters.get(key, least), least)
        if len(counters) > self._most_counters:
            # What is forgotten here would be lifted to this value anyway.
            self._counters = {
                k: count for k, count in counters.items() if count > least or k in self._lines
            } | {key: counters[key]}
            self._most_counters = 2 * len(self._counters) + 16

    def check(self, running: Iterable[Sequence] = ()) -> None:
        """Raise AssertionError where the queue contradicts itself or what runs."""
        super().check(running)
        assert self._lines.keys() <= self._counters.keys()


QUEUES: dict[str, type[WaitingQueue]] = {
    "fcfs": WaitingQueue,
    "priority": PriorityQueue,
    "fair": FairQueue,
}
