"""Streams that can be resumed. What such an answer has said is kept, every event under a number, by
a task of its own; whoever reads it, the request itself or a client that comes back, follows what is
kept. A connection that breaks then ends nothing but the reading.

An answer that nobody reads any more is given up after a grace period, unless it is to be finished
in the background, and one that is over is forgotten after a while. What is kept is bounded for each
tenant and in all: first what is over goes, the oldest before the others, then the older half of the
longest.
"""

import asyncio
import collections
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from server.admission import Gate
from server.chat.sse import EventStream, OnError, known, last_words
from server.metrics import Metrics
from wire import spans
from wire.errors import (
    ClientError,
    ClientTooSlow,
    InvalidRequest,
    NotFound,
    ServiceError,
    Unavailable,
)
from wire.logs import about, request_id
from wire.settings import ServerSettings

logger = logging.getLogger(__name__)

# Readers of one answer at once. One that comes back may be earlier than the news that it had gone.
READERS = 4
# Bytes sent at once to a reader that is behind.
PIECE = 64 << 10
# Beside its own bytes, what an event takes.
_OVERHEAD = 64


class EventsForgotten(ClientError):
    """The events that a client asks for are no longer kept."""

    status = 410
    code = "events_forgotten"


class Recording:
    """One answer. It works from ``begin`` on, or when it is first followed, holds ``held`` (with
    its permit) until it is over, and holds up a drain until somebody has read its end or nobody
    comes. An error behind its first event, the number ``first``, becomes what ``on_error`` makes of
    it. One that is ``lasting`` is not given up."""

    def __init__(
        self,
        tenant: bytes,
        events: AsyncGenerator[bytes, None],
        shelf: "Recordings",
        name: str,
        on_error: OnError = last_words,
        first: int = 1,
        *,
        lasting: bool = False,
    ) -> None:
        self.tenant = tenant
        self.name = name
        self.on_error = on_error
        self.before = first - 1
        self.over = False
        self.size = 0  # bytes
        self._origin = request_id.get()
        self.span = spans.current.get()
        self._events = events
        self._shelf = shelf
        self._lasting = lasting
        self._kept: list[bytes] = []
        self._first = first  # number of the first that is kept
        self._error: ServiceError | None = None  # instead of a first event
        self._ending: ServiceError = Unavailable("The server is stopping.")  # if it is cancelled
        self._readers: list[asyncio.Event] = []  # the newest last
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = contextlib.ExitStack()

    @property
    def last(self) -> int:
        """Number of the last event so far."""
        return self._first + len(self._kept) - 1

    @property
    def is_read(self) -> bool:
        """Whether anybody follows."""
        return bool(self._readers)

    def check(self, after: int, field: str) -> None:
        """Raises a ClientError if the events behind ``after``, which ``field`` of the request says,
        cannot be given."""
        if after > self.last:
            raise InvalidRequest(
                f"{field} is {after}, but the last event has been {self.last}.", param=field
            )
        if after + 1 < self._first:
            raise EventsForgotten(
                f"The events from {after + 1} to {self._first - 1} of this answer are no longer "
                "kept.",
                param=field,
            )

    def begin(self, held: contextlib.AsyncExitStack | None = None) -> None:
        """Work from now on. What ``held`` holds is taken over."""
        # Taken now: until here the request that made it gives it back.
        taken = held.pop_all() if held is not None else contextlib.AsyncExitStack()
        self._shelf.add(self)
        self._busy.enter_context(self._shelf.gate.reading())
        self._task = asyncio.create_task(self._record(taken))

    async def follow(
        self, after: int, held: contextlib.AsyncExitStack | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The events behind number ``after``, as they come. Raises what the answer failed with
        before its first event. A reader that falls behind what is kept, or gives way to others, is
        told so at the number of the last event that it has got: there it may go on.

        What ``held`` holds is taken over by the first to follow.
        """
        if self._task is None:
            self.begin(held)
        more = self._attach()
        try:
            while True:
                while after < self.last:
                    if after + 1 < self._first:
                        raise ClientTooSlow(
                            "What comes next is no longer kept: the answer was read too slowly, or "
                            "is too large."
                        )
                    piece, after = self._piece(after)
                    yield piece
                if self.over:
                    self._busy.close()
                    if self._error is not None:
                        raise self._error
                    return
                await more.wait()
                more.clear()
                if more not in self._readers:
                    raise ClientTooSlow("Others have begun to read this answer.", code="superseded")
        except ClientTooSlow as error:
            if error is self._error:
                raise
            yield self.on_error(error, after)
        finally:
            if more in self._readers:
                self._readers.remove(more)
            if not self._readers:
                self._await_reader()

    def _attach(self) -> asyncio.Event:
        if not self.over:
            self.stop_timer()
        if len(self._readers) == READERS:
            self._readers.pop(0).set()
        more = asyncio.Event()
        self._readers.append(more)
        return more

    def _piece(self, after: int) -> tuple[bytes, int]:
        """Some of what is behind ``after``, and the number it ends with."""
        start = stop = after + 1 - self._first
        size = 0
        while stop < len(self._kept) and size < PIECE:
            size += len(self._kept[stop])
            stop += 1
        piece = self._kept[start] if stop == start + 1 else b"".join(self._kept[start:stop])
        return piece, after + stop - start

    async def _record(self, held: contextlib.AsyncExitStack) -> None:
        try:
            async with held, contextlib.aclosing(self._events):
                async for event in self._events:
                    self._keep(event)
                    if len(event) > PIECE:
                        # The last events of a response may be megabytes each: others go on between.
                        await asyncio.sleep(0)
        except asyncio.CancelledError:
            # Somebody may have come back between the end of the patience and this one.
            self._fail(self._ending)
        except Exception as error:
            failure = known(error)
            spans.fail(failure)
            self._fail(failure)
        finally:
            self._end()

    def _fail(self, error: ServiceError) -> None:
        if self.last == self.before:
            self._error = error
            return
        for event in self.on_error(error, self.last + 1).split(b"\n\n")[:-1]:
            self._keep(event + b"\n\n")

    def _keep(self, event: bytes) -> None:
        numbered = b"id: %d\n%b" % (self.last + 1, event)
        self._kept.append(numbered)
        for more in self._readers:
            more.set()
        self._shelf.grow(self, len(numbered) + _OVERHEAD)

    def _end(self) -> None:
        self.over = True
        for more in self._readers:
            more.set()
        self._shelf.settle(self)
        if not self._readers:
            self._await_reader()

    def _await_reader(self) -> None:
        """There is none now."""
        if self.over:
            asyncio.get_running_loop().call_later(self._shelf.grace, self._busy.close)
        elif not self._lasting:
            self.start_timer(self._shelf.grace, self._give_up)

    def _give_up(self) -> None:
        with about(self._origin):  # not whoever has read it last
            logger.info("request=%s is ended: nobody has come back to read its answer", self.name)
        self._shelf.forget(self)
        if self._task is not None:
            self._ending = ClientTooSlow("Nobody has read this answer for too long.")
            self._task.cancel()

    def start_timer(self, seconds: float, call: Callable[[], None]) -> None:
        """The only one: until somebody comes back, and later until it is forgotten."""
        self.stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, call)

    def stop_timer(self) -> None:
        """Nothing happens by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def release(self) -> None:
        """Hold up a drain no longer, unless somebody reads."""
        if not self._readers:
            self._busy.close()

    def shorten(self) -> int:
        """Forget the older half; how many bytes that were."""
        half = (len(self._kept) + 1) // 2
        freed = sum(len(event) + _OVERHEAD for event in self._kept[:half])
        del self._kept[:half]
        self._first += half
        self.size -= freed
        return freed

    async def close(self) -> None:
        """End it, whatever state it is in. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._busy.close()


class Recordings:
    """All answers that can be resumed, by their id."""

    def __init__(self, settings: ServerSettings, gate: Gate, metrics: Metrics) -> None:
        self.gate = gate
        self._ttl = settings.resume_ttl
        self.grace = settings.resume_grace
        self._keep_alive = settings.keep_alive_interval
        self._limit = settings.resume_bytes
        self._tenant_limit = settings.resume_key_bytes
        self._by_name: dict[str, Recording] = {}  # the oldest first
        self._used = collections.Counter[bytes]()  # bytes, by tenant
        self._total = 0
        self._resumed = metrics.streams_resumed
        metrics.show(
            internvl_resumable_streams=lambda: len(self._by_name),
            internvl_resumable_bytes=lambda: self._total,
        )

    def open(
        self,
        name: str,
        tenant: bytes,
        events: AsyncGenerator[bytes, None],
        on_error: OnError,
        first: int = 1,
        *,
        lasting: bool = False,
    ) -> Recording:
        """A new one: see there."""
        return Recording(tenant, events, self, name, on_error, first, lasting=lasting)

    def stream(
        self, recording: Recording, place: str, held: contextlib.AsyncExitStack | None = None
    ) -> EventStream:
        """All of ``recording``, which is found again at ``place``, relative to the request. If it
        has not begun, what ``held`` holds is its own from when the stream is sent."""
        stream = self._follow(recording, recording.before, held)
        # Where to come back to, also if not even the first event arrives.
        stream.headers["Content-Location"] = place
        return stream

    def find(self, name: str, tenant: bytes) -> Recording | None:
        """The answer ``name``, if it is that tenant's."""
        recording = self._by_name.get(name)
        return recording if recording is not None and recording.tenant == tenant else None

    def resume(self, name: str, tenant: bytes, after: int | None, field: str) -> EventStream | None:
        """What ``tenant`` has missed of answer ``name`` behind event ``after``, and what comes;
        None if nothing does. Raises NotFound, and what ``Recording.check`` raises."""
        recording = self.find(name, tenant)
        if recording is None:
            raise NotFound(
                "There is no such stream: it was not asked to be resumable, or it is over for too "
                "long, or nobody had read it for too long."
            )
        if after is None:
            after = recording.before
        recording.check(after, field)
        self._resumed.add()
        if recording.span is not None and (reading := spans.current.get()) is not None:
            reading.link(recording.span)
        if recording.over and after == recording.last:
            return None
        return self._follow(recording, after)

    def _follow(
        self,
        recording: Recording,
        after: int,
        held: contextlib.AsyncExitStack | None = None,
    ) -> EventStream:
        events = recording.follow(after, held)
        return EventStream(events, self._keep_alive, recording.on_error)

    def grow(self, recording: Recording, size: int) -> None:
        """``recording`` has become so much larger: others, or its own beginning, give way."""
        recording.size += size
        if self._by_name.get(recording.name) is not recording:
            return  # forgotten, but read to its end
        self._count(recording.tenant, size)
        while self._used[recording.tenant] > self._tenant_limit:
            self._give_way(recording.tenant)
        while self._total > self._limit:
            self._give_way(max(self._used, key=self._used.__getitem__))

    def _give_way(self, tenant: bytes) -> None:
        own = (one for one in self._by_name.values() if one.tenant == tenant)
        # The oldest one that is kept is nearly always over: the others are not looked at.
        idle = next((one for one in own if one.over and not one.is_read), None)
        if idle is not None:
            self.forget(idle)
        else:
            own = (one for one in self._by_name.values() if one.tenant == tenant)
            self._count(tenant, -max(own, key=lambda one: one.size).shorten())

    def _count(self, tenant: bytes, size: int) -> None:
        self._total += size
        self._used[tenant] += size
        if not self._used[tenant]:
            del self._used[tenant]

    def add(self, recording: Recording) -> None:
        """It has begun."""
        self._by_name[recording.name] = recording

    def settle(self, recording: Recording) -> None:
        """It is over: forget it after a while, and at once if there is nothing in it."""
        if not recording.size:
            self.forget(recording)
        elif self._by_name.get(recording.name) is recording:
            recording.start_timer(self._ttl, lambda: self.forget(recording))

    def forget(self, recording: Recording) -> None:
        """Nobody can come back to it."""
        if self._by_name.get(recording.name) is recording:
            del self._by_name[recording.name]
            self._count(recording.tenant, -recording.size)
            recording.stop_timer()
            recording.release()

    async def close(self) -> None:
        """End all."""
        for recording in list(self._by_name.values()):
            await recording.close()
            self.forget(recording)
