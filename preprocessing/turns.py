"""Many pieces of work, a few at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


async def few_at_a_time(
    work: Callable[[S], Awaitable[T]], parts: Sequence[S], at_once: int
) -> list[T]:
    """``work`` of all parts, in order; the first failure cancels the rest.

    Only ``at_once`` are on their way at a time: whoever comes next does not wait for all of them.
    """
    places = asyncio.Semaphore(at_once)

    async def one(part: S) -> T:
        async with places:
            return await work(part)

    tasks = [asyncio.ensure_future(one(part)) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)
        # They keep their errors, whose frames keep them, and what the parts hold.
        tasks.clear()


async def _end(tasks: Sequence["asyncio.Future[T]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
