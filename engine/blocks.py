"""The pool of KV-cache blocks: which are free, how often each of the others is referenced, and
which holds what.

Only the Scheduler calls it. A block is a number, ``0 .. total - 1``; the pool never decides who
gets one, and of what is in it knows the digest if it is full, and what it begins with.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.prefix import Part, Parts


class BlockPool:
    """Free list in eviction order, a reference count per block, and published contents.

    A block is in the free list exactly when its count is zero. Freed blocks go to the end of
    the list, the last block of a sequence first, so that the oldest contents are overwritten
    first and of one sequence its tail before its head. A published block can be found by its
    digest until it is handed out again, also while it is free; so can one that is noted, by what
    it begins with.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        # Ordered and with O(1) removal anywhere: hits take blocks out of the middle.
        self._free = OrderedDict[int, None].fromkeys(range(total))
        self._references = [0] * total
        self._digests: list[bytes | None] = [None] * total
        self._found: dict[bytes, int] = {}
        self._parts = Parts()

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free)

    @property
    def references(self) -> dict[int, int]:
        """How often each block that is not free is referenced."""
        return {block: count for block, count in enumerate(self._references) if count}

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, each with one reference; None, and nothing taken, if too few."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        self.forget(blocks)
        return blocks

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of ``digests`` that is all there. Takes nothing."""
        blocks = []
        for digest in digests:
            block = self._found.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` nobody references."""
        return sum(not self._references[block] for block in blocks)

    def count_single(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` have one reference."""
        return sum(self._references[block] == 1 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each of ``blocks``, which ``match`` has found."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def publish(self, block: int, digest: bytes) -> None:
        """Let a block be found: it is full and will not change while it is referenced.

        Of two blocks with the same contents the first stays the one that is found.
        """
        if self._found.setdefault(digest, block) == block:
            self._digests[block] = digest

    def note(self, block: int, parent: bytes, part: Part) -> None:
        """Let what a block begins with be found behind its parent; that will not change while the
        block is referenced."""
        self._parts.note(block, parent, part)

    def find_part(self, parent: bytes, wanted: Part) -> tuple[int, int]:
        """A block that begins with the most of what is wanted, and how many positions; 0: none."""
        return self._parts.find(parent, wanted)

    def forget(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks any more."""
        for block in blocks:
            self._parts.forget(block)
            digest, self._digests[block] = self._digests[block], None
            if digest is not None:
                del self._found[digest]

    def forget_digests(self, digests: Iterable[bytes]) -> None:
        """Let nothing be found by any of these any more, nor behind them."""
        for digest in digests:
            self._parts.forget_behind(digest)
            if digest in self._found:
                self.forget([self._found[digest]])

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block of a sequence, which are in its own order."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def check(self) -> None:
        """Raise AssertionError where the pool contradicts itself."""
        assert set(self._free) == {b for b, n in enumerate(self._references) if n == 0}, (
            "the free list and the reference counts disagree"
        )
        assert min(self._references, default=0) >= 0, "a block was freed too often"
        published = {d: b for b, d in enumerate(self._digests) if d is not None}
        assert published == self._found, "a block is found under a digest that is not its own"
        self._parts.check()
