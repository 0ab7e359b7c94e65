"""Random operations on the block pool and the vision cache, against simple models of them."""

import itertools
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.vision_cache import VisionCache

TOTAL = 12
BUDGET = 20
ALL_NAMES = [bytes([name]) for name in range(6)]
NAMES = st.sampled_from(ALL_NAMES)


class BlockPoolMachine(RuleBasedStateMachine):
    """Owners come, share what is published, and go.

    The model: blocks per owner, free blocks in the order in which they will be handed out, and
    the block that is found under each name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.owners: list[list[int]] = []
        self.free_blocks = list(range(TOTAL))
        self.found: dict[bytes, int] = {}

    def pick(self, data: st.DataObject) -> list[int]:
        return self.owners[data.draw(st.integers(0, len(self.owners) - 1))]

    def lose(self, blocks: list[int]) -> None:
        self.found = {name: block for name, block in self.found.items() if block not in blocks}

    @rule(count=st.integers(0, TOTAL + 2))
    def allocate(self, count: int) -> None:
        blocks = self.pool.allocate(count)
        if count > len(self.free_blocks):
            assert blocks is None
            return
        assert blocks == self.free_blocks[:count]
        del self.free_blocks[:count]
        self.lose(blocks)
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), name=NAMES)
    def publish(self, data: st.DataObject, name: bytes) -> None:
        unnamed = [b for b in self.pick(data) if b not in self.found.values()]
        if unnamed:
            self.pool.publish(unnamed[0], name)
            self.found.setdefault(name, unnamed[0])

    @rule(names=st.lists(NAMES, max_size=4, unique=True))
    def share(self, names: list[bytes]) -> None:
        blocks = self.pool.match(names)
        known = list(itertools.takewhile(self.found.__contains__, names))
        assert blocks == [self.found[name] for name in known]
        assert self.pool.count_free(blocks) == sum(b in self.free_blocks for b in blocks)
        self.pool.share(blocks)
        self.free_blocks = [b for b in self.free_blocks if b not in blocks]
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = self.pick(data)
        self.pool.forget(blocks)
        self.lose(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.pick(data)
        self.owners.remove(blocks)
        single = [b for b in blocks if not any(b in others for others in self.owners)]
        assert self.pool.count_single(blocks) == len(single)
        self.pool.free(blocks)
        self.free_blocks += reversed(single)

    @invariant()
    def the_pool_agrees_with_the_model(self) -> None:
        self.pool.check()
        owned = Counter(block for blocks in self.owners for block in blocks)
        assert self.pool.references == owned
        assert self.pool.num_free == len(self.free_blocks) == TOTAL - len(owned)
        for name in ALL_NAMES:
            assert self.pool.match([name]) == ([self.found[name]] if name in self.found else [])


class VisionCacheMachine(RuleBasedStateMachine):
    """Readers of shared entries; ``held`` is the model: digest -> sizes and readers."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = VisionCache(BUDGET)
        self.readers: dict[int, int] = {}
        self.resident: dict[int, int] = {}
        self.tiles: set[tuple[int, int]] = set()  # (name, tile) encoded

    def forget_dropped(self) -> None:
        for digest in self.cache.take_dropped():
            assert not self.readers.get(digest[0]), "a referenced entry was dropped"
            del self.resident[digest[0]]
            self.tiles = {(name, tile) for name, tile in self.tiles if name != digest[0]}

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
    @rule(data=st.data(), tile=st.integers(0, 2))
    def encode(self, data: st.DataObject, tile: int) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, r in self.readers.items() if r)))
        self.cache.add_tile(bytes([name]), tile)
        self.tiles.add((name, tile))

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
        for name in range(8):
            for tile in range(3):
                assert self.cache.has_tile(bytes([name]), tile) == ((name, tile) in self.tiles)


BlockPoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
VisionCacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBlockPool = BlockPoolMachine.TestCase
TestVisionCache = VisionCacheMachine.TestCase
