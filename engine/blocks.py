"""The pool of KV-cache blocks: which are free, and how often each of the others is referenced.

Only the Scheduler calls it. A block is a number, ``0 .. total - 1``; the pool never sees what is
in it and never decides who gets one.
"""

from collections import deque
from collections.abc import Sequence


class BlockPool:
    """Free list in eviction order, and a reference count per block.

    A block is in the free list exactly when its count is zero. Freed blocks go to the end of
    the list, the last block of a sequence first, so that the oldest contents are overwritten
    first and of one sequence its tail before its head.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = deque(range(total))
        self._references = [0] * total

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, each with one reference; None, and nothing taken, if too few."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block of a sequence, which are in its own order."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError where the pool contradicts itself."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert free == {b for b, n in enumerate(self._references) if n == 0}, (
            "the free list and the reference counts disagree"
        )
        assert min(self._references, default=0) >= 0, "a block was freed too often"
