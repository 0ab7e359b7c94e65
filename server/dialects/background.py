"""Responses that are answered in the background: whoever asked for one has its id, comes back for
it, and may cancel it. When it is over it is among the kept ones (``server.dialects.store``)."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator

from server.schemas.response import ResponseObject


@dataclasses.dataclass(frozen=True)
class Running:
    """One of them, as it is now, and the ``items`` that it answers, each as JSON. ``over`` is set
    at its end."""

    response: ResponseObject
    items: tuple[bytes, ...]
    over: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class Background:
    """All that run, by tenant and id. Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: dict[tuple[bytes, str], Running] = {}

    def find(self, tenant: bytes, name: str) -> Running | None:
        """The tenant's response of this id, if it runs."""
        return self._running.get((tenant, name))

    def add(
        self, tenant: bytes, running: Running, events: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """Count a response as running until its ``events``, which are passed on, are closed."""
        self._running[tenant, running.response.id] = running
        return self._pass(tenant, running, events)

    async def _pass(
        self, tenant: bytes, running: Running, events: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        finally:
            del self._running[tenant, running.response.id]
            running.over.set()
