"""By which requests that are being answered are ended by their owners, whatever they are doing:
waiting for pictures, waiting for the engine, or generating."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator

from engine.client import EngineClient
from wire.errors import RequestAborted


class Handle:
    """One request of a tenant, under all its ``names``. It lasts as long as somebody has it."""

    def __init__(self, tenant: bytes = b"", *names: str) -> None:
        self.tenant = tenant
        self.names = names
        self._aborted = self._refused = False
        self._preparing: asyncio.Timeout | None = None
        self._submitted: list[str] = []

    @contextlib.asynccontextmanager
    async def preparing(self) -> AsyncIterator[None]:
        """What is done before the engine hears of it, or when it has done its part. Raises
        RequestAborted, wherever it waits."""
        self._preparing = asyncio.timeout(None)
        try:
            async with self._preparing:
                yield
        except BaseException as error:
            self._refused = True
            if isinstance(error, TimeoutError) and self._aborted:
                raise _aborted() from None
            raise
        finally:
            self._preparing = None

    def submit(self, identity: str) -> None:
        """The engine is given a request of this name. Raises RequestAborted."""
        if self._aborted:
            raise _aborted()
        self._submitted.append(identity)

    def abort(self, engine: EngineClient) -> bool:
        """End it; whoever waits for it gets a RequestAborted. False if it has ended already."""
        self._aborted = True
        ended = [engine.abort(identity, _aborted()) for identity in self._submitted]
        if self._preparing is not None and not self._preparing.expired():
            self._preparing.reschedule(0)
            return True
        return any(ended) or not (ended or self._refused)


def _aborted() -> RequestAborted:
    return RequestAborted("The request was aborted by its owner.")


class Handles:
    """All that are open. Belongs to one event loop."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._open = weakref.WeakSet[Handle]()

    def open(self, tenant: bytes, *names: str) -> Handle:
        """For a request that has just come."""
        handle = Handle(tenant, *names)
        self._open.add(handle)
        return handle

    def abort(self, tenant: bytes, name: str) -> bool:
        """End the tenant's requests of this name; whether there are any."""
        found = [
            handle
            for handle in list(self._open)
            if handle.tenant == tenant and name in handle.names
        ]
        ended = [handle.abort(self._engine) for handle in found]
        return any(ended)
