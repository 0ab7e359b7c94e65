"""A number of bytes that many share: who asks for more than is left waits, and whoever came first
is served first, so that nobody who needs much is passed for ever by those who need little. Knows
nothing of what the bytes are for: the pipeline bounds the pictures being decoded with it, the
server the tiles of the requests being answered."""

import asyncio
import collections
import contextlib
import threading
from collections.abc import AsyncIterator


class Share:
    """Bytes of a budget, while its context lasts."""

    def __init__(self, budget: "Budget", size: int) -> None:
        self._budget = budget
        self.size = size

    def grow(self, size: int) -> bool:
        """Take ``size`` bytes more, at once or not at all. Safe in every thread."""
        if not self._budget._take(size):
            return False
        self.size += size
        return True

    def keep(self, size: int) -> None:
        """Give back what is over ``size``."""
        if size < self.size:
            self._budget._give_back(self.size - size)
            self.size = size


class Budget:
    """``total`` bytes. Belongs to one event loop, but for ``Share.grow``.

    Bytes of a budget ``within`` another one are bytes of both. Its shares begin empty and grow:
    nobody would wake them when the other has bytes again.
    """

    def __init__(self, total: int, within: "Budget | None" = None) -> None:
        self.total = self._left = total
        self._within = within
        self._lock = threading.Lock()
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return self.total - self._left

    @contextlib.asynccontextmanager
    async def share(self, size: int, patience: float | None = None) -> AsyncIterator[Share]:
        """Hold ``size`` bytes; all of them if there are no more in total.

        Raises TimeoutError if they cannot be had within ``patience`` seconds.
        """
        share = Share(self, min(size, self.total))
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((share.size, turn))
        self._admit()
        try:
            async with asyncio.timeout(patience):
                await turn
            yield share
        finally:
            self._give_back(0 if turn.cancelled() else share.size)

    def _take(self, size: int) -> bool:
        with self._lock:
            if size > self._left or (self._within and not self._within._take(size)):
                return False
            self._left -= size
            return True

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._left += size
        if self._within:
            self._within._give_back(size)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():  # else nobody waits for it any more
                if not self._take(size):
                    return
                turn.set_result(None)
            self._waiting.popleft()
