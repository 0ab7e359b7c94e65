"""The block pool."""

import pytest

from engine.blocks import BlockPool


def test_a_block_is_never_handed_out_twice_at_once() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(4), pool.allocate(2)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == list(range(6))
    pool.check()


def test_too_large_a_demand_takes_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(3) is not None
    assert pool.allocate(1) is None


def test_freed_blocks_are_used_again_oldest_first_and_tail_before_head() -> None:
    pool = BlockPool(4)
    sequence = pool.allocate(3)
    assert sequence == [0, 1, 2]
    pool.free(sequence)
    assert pool.allocate(4) == [3, 2, 1, 0]


def test_freeing_a_block_twice_is_noticed() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    pool.free(blocks)
    with pytest.raises(AssertionError):
        pool.check()
