"""Bytes shared by many: bounded, in the order of asking, and always given back."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.budget import Budget, Share


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holder:
    """One that asks for a share and keeps it until told."""

    def __init__(self, budget: Budget, size: int) -> None:
        self.size, self.has = size, False
        self._leave = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(budget))

    async def _hold(self, budget: Budget) -> None:
        async with budget.share(self.size):
            self.has = True
            try:
                await self._leave.wait()
            finally:
                self.has = False

    async def leave(self) -> None:
        self._leave.set()
        await settle()


async def test_bytes_of_a_budget_within_another_are_bytes_of_both() -> None:
    whole = Budget(10)
    part = Budget(6, within=whole)
    async with part.share(0) as one, part.share(0) as two, whole.share(0) as other:
        assert one.grow(4)
        assert (part.used, whole.used) == (4, 4)
        assert not two.grow(3)  # of the part there is less
        assert other.grow(5)
        assert not two.grow(2)  # of the whole there is less
        assert two.grow(1)
        assert (part.used, whole.used) == (5, 10)
        one.keep(1)
        assert other.grow(3)
    assert (part.used, whole.used) == (0, 0)


async def test_whoever_asks_first_is_served_first_even_if_less_would_fit() -> None:
    budget = Budget(10)
    first, large, small = (Holder(budget, size) for size in (6, 5, 1))
    await settle()
    assert (first.has, large.has, small.has) == (True, False, False)
    await first.leave()
    assert (large.has, small.has) == (True, True)
    await large.leave()
    await small.leave()


async def test_more_than_there_is_gets_all_of_it_alone() -> None:
    budget = Budget(10)
    small, huge = Holder(budget, 1), Holder(budget, 1000)
    await settle()
    assert (small.has, huge.has) == (True, False)
    await small.leave()
    assert huge.has
    await huge.leave()


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=12), st.randoms())
def test_whoever_leaves_and_however_nothing_is_lost(asked: list[tuple[int, bool]], random) -> None:  # type: ignore[no-untyped-def]
    async def scene() -> None:
        budget = Budget(10)
        holders = [(Holder(budget, size), cancels) for size, cancels in asked]
        while holders:
            if random.random() < 0.7:
                await settle()
            assert sum(min(holder.size, 10) for holder, _ in holders if holder.has) <= 10
            holder, cancels = holders.pop(random.randrange(len(holders)))
            if cancels:
                holder.task.cancel()
            else:
                await holder.leave()
                holder._leave.set()
            if cancels or random.random() < 0.5:
                await settle()
            if not cancels and not holder.task.done():
                holder.task.cancel()
        await settle()
        async with asyncio.timeout(60), budget.share(10):
            pass

    asyncio.run(scene())


async def test_an_error_gives_its_share_back() -> None:
    budget = Budget(10)
    with contextlib.suppress(ValueError):
        async with budget.share(10):
            raise ValueError
    with pytest.raises(TimeoutError):
        async with budget.share(10), asyncio.timeout(0), budget.share(1):
            pass
    async with asyncio.timeout(60), budget.share(10):
        pass


async def test_what_is_not_needed_goes_to_whoever_waits() -> None:
    budget = Budget(10)
    async with budget.share(9) as share:
        waiting = Holder(budget, 6)
        await settle()
        share.keep(5)
        assert not waiting.has
        share.keep(4)
        await settle()
        assert waiting.has
        share.keep(100)  # it cannot grow
        assert budget.used == 10
    await waiting.leave()
    assert budget.used == 0


async def test_whoever_waits_too_long_gets_nothing_and_holds_nobody_up() -> None:
    budget = Budget(10)
    async with budget.share(6, patience=0):
        with pytest.raises(TimeoutError):
            async with budget.share(5, patience=0):
                raise AssertionError
        async with budget.share(4, patience=0):
            assert budget.used == 10
    assert budget.used == 0


async def test_a_share_grows_at_once_or_not_at_all() -> None:
    budget = Budget(10)
    async with budget.share(4) as first, budget.share(0) as second:
        assert second.grow(6)
        assert not second.grow(1)
        assert not first.grow(1)
        assert budget.used == 10
        first.keep(1)
        assert second.grow(3)
    assert budget.used == 0


async def test_shares_may_grow_in_threads() -> None:
    budget = Budget(40_000)

    def grow() -> None:
        share = Share(budget, 0)
        for _ in range(5000):
            assert share.grow(1)

    await asyncio.gather(*(asyncio.to_thread(grow) for _ in range(8)))
    assert budget.used == 40_000
