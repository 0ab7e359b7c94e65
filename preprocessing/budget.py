"""A number of bytes that many share: who asks for more than is left waits, and whoever came first
is served first, so that nobody who needs much is passed for ever by those who need little. Knows
nothing of what the bytes are for; the pipeline bounds its pictures with it."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator


class Budget:
    """``total`` bytes. Belongs to one event loop."""

    def __init__(self, total: int) -> None:
        self._total = self._left = total
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @contextlib.asynccontextmanager
    async def share(self, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes; all of them if there are no more in total."""
        size = min(size, self._total)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._left += size
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():  # else nobody waits for it any more
                if size > self._left:
                    return
                self._left -= size
                turn.set_result(None)
            self._waiting.popleft()
