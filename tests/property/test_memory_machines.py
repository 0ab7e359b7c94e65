"""Random operations on the block pool and the vision cache, against simple models of them."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.vision_cache import VisionCache

TOTAL = 12
BUDGET = 20


class BlockPoolMachine(RuleBasedStateMachine):
    """Owners come and go; what they own is disjoint, and together with the rest everything."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.owners: list[list[int]] = []

    @rule(count=st.integers(0, TOTAL + 2))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(blocks) == count
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owners) - 1))
        self.pool.free(self.owners.pop(index))

    @invariant()
    def every_block_has_one_place(self) -> None:
        self.pool.check()
        owned = [block for blocks in self.owners for block in blocks]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.pool.num_free == TOTAL


class VisionCacheMachine(RuleBasedStateMachine):
    """Readers of shared entries; ``held`` is the model: digest -> sizes and readers."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = VisionCache(BUDGET)
        self.readers: dict[int, int] = {}
        self.resident: dict[int, int] = {}

    def forget_dropped(self) -> None:
        for digest in self.cache.take_dropped():
            assert not self.readers.get(digest[0]), "a referenced entry was dropped"
            del self.resident[digest[0]]

    @rule(name=st.integers(0, 7), size=st.integers(1, BUDGET + 10))
    def need(self, name: int, size: int) -> None:
        digest = bytes([name])
        pinned = sum(self.resident[n] for n, readers in self.readers.items() if readers)
        if name in self.resident:
            assert self.cache.acquire(digest)
        else:
            assert not self.cache.acquire(digest)
            fits = pinned == 0 or pinned + size <= BUDGET
            assert self.cache.reserve(digest, size) == fits
            self.forget_dropped()
            if not fits:
                return
            self.resident[name] = size
        self.readers[name] = self.readers.get(name, 0) + 1

    @precondition(lambda self: any(self.readers.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, r in self.readers.items() if r)))
        self.readers[name] -= 1
        self.cache.release(bytes([name]))
        self.forget_dropped()

    @invariant()
    def the_cache_agrees_with_the_model(self) -> None:
        self.cache.check()
        assert self.cache.used == sum(self.resident.values())
        assert self.cache.num_referenced == sum(1 for r in self.readers.values() if r)
        assert self.cache.used <= BUDGET or len(self.resident) == 1


BlockPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
VisionCacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBlockPool = BlockPoolMachine.TestCase
TestVisionCache = VisionCacheMachine.TestCase
