"""The engine requests of one chat request: one per choice, their outputs merged as they come."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec

from engine.client import EngineClient
from server.chat.prepare import PreparedChat
from wire.errors import EngineFailed
from wire.messages import EngineOutput, EngineRequest
from wire.sampling import MAX_SEED


class Choices:
    """Runs ``chat.n`` requests. ``outputs`` yields (index, output) until all are over, or
    ``chat.handle`` ends them.

    The first one starts alone; the others follow its first output, when the prompt they share is
    in the prefix cache. Choice k draws with seed + k, as a request of its own with that seed would.
    """

    def __init__(self, chat: PreparedChat, engine: EngineClient) -> None:
        self._chat = chat
        self._engine = engine
        # The engine client joins what waits; a queue of any length would keep it apart.
        self._arrived: asyncio.Queue[tuple[int, EngineOutput | Exception]] = asyncio.Queue(1)
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._only: AsyncGenerator[EngineOutput] | None = None
        self._open = set(range(chat.n))

    async def outputs(self) -> AsyncGenerator[tuple[int, EngineOutput]]:
        """Close it to abort what still runs. Raises what a request raises."""
        if self._chat.n == 1:
            # No task, no queue: one stream is what nearly everybody asks for.
            async with contextlib.aclosing(self._submit(0)) as self._only:
                async for only in self._only:
                    yield 0, only
                    if not self._open:
                        return
            return
        try:
            self._start(0)
            while self._open:
                index, output = await self._arrived.get()
                if index not in self._open:
                    continue  # ended by a stop string, and had one more on its way
                if isinstance(output, Exception):
                    raise output
                for other in range(1, self._chat.n):
                    self._start(other)
                yield index, output
        finally:
            readers = self._readers.values()
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def end(self, index: int) -> None:
        """This choice is over: nothing more of it is yielded, and what still runs is aborted."""
        self._open.discard(index)
        if index in self._readers:
            self._readers[index].cancel()
        elif self._only is not None:
            await self._only.aclose()

    def _start(self, index: int) -> None:
        if index not in self._readers:
            self._readers[index] = asyncio.create_task(self._read(index))

    async def _read(self, index: int) -> None:
        try:
            async with contextlib.aclosing(self._submit(index)) as outputs:
                async for output in outputs:
                    await self._arrived.put((index, output))
        except Exception as error:
            await self._arrived.put((index, error))
        else:
            ending = EngineFailed("The engine could not finish this request.")
            await self._arrived.put((index, ending))

    def _submit(self, index: int) -> AsyncGenerator[EngineOutput]:
        request = self._request(index)
        self._chat.handle.submit(request.id)
        return self._engine.submit(request, self._chat.buffers)

    def _request(self, index: int) -> EngineRequest:
        request = self._chat.engine
        if index == 0:
            return request
        seed = (request.sampling.seed + index + MAX_SEED + 1) % (2 * MAX_SEED + 2) - MAX_SEED - 1
        # The prompt is the same: the first one reports it.
        sampling = msgspec.structs.replace(request.sampling, seed=seed, prompt_logprobs=-1)
        return msgspec.structs.replace(request, id=f"{request.id}-{index}", sampling=sampling)
