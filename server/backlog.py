"""How much may wait: requests, and tokens of their prompts, that were given to the engine and have
no first token yet. What would exceed a limit is refused before the engine hears of it, with a 429
that says when to come back. Where nothing waits, a request is let in however large it is.

Under the fair policy nobody can fill the queue for others: a tenant is still let in when it has
nothing waiting itself, or when it stays within an equal part of the limit, the limit divided by
the number of tenants that wait. So k tenants can exceed a limit by a factor of 1 + 1/2 + … + 1/k,
and by one request each.
"""

import collections
import math
import time
from collections.abc import Callable

from server.limits import Spending
from server.metrics import Metrics
from wire.errors import Code, ServiceError, TooManyRequests
from wire.settings import ServerSettings

# Seconds of the past from which the drain rate is known, and the longest that anybody is sent away.
WINDOW = 60
# Seconds to come back after where nothing is known.
UNKNOWN = 5


class Backlog:
    """Counts what waits, in all and for each tenant. Belongs to one event loop."""

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        *,
        fair: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = {
            "requests": settings.max_num_queued_reqs,
            "tokens": settings.max_num_queued_tokens,
        }
        self._metrics = metrics
        self._fair = fair
        self._clock = clock
        self._all = collections.Counter(requests=0, tokens=0, visual=0)
        metrics.show(
            internvl_num_requests_waiting=lambda: self._all["requests"],
            internvl_num_prompt_tokens_waiting=lambda: self._all["tokens"],
            internvl_num_visual_tokens_waiting=lambda: self._all["visual"],
        )
        self._tenants: dict[bytes, collections.Counter[str]] = {}
        # Moments when something got its first token, and how much had before it.
        self._drained = collections.Counter(requests=0, tokens=0)
        self._history: collections.deque[tuple[float, collections.Counter[str]]] = (
            collections.deque(maxlen=256)
        )

    def check(self, tenant: bytes, requests: int, tokens: int = 0) -> None:
        """Raise TooManyRequests where so much more of a tenant would not be let in."""
        for kind, more in (("requests", requests), ("tokens", tokens)):
            over = self._all[kind] + more - self._limits[kind]
            if over <= 0 or not more or not self._all["requests"]:
                continue
            if self._fair and self._has_part(tenant, kind, more):
                continue
            code: Code = "queue_full_tokens" if kind == "tokens" else "queue_full_requests"
            self._metrics.refused.add(code)
            raise TooManyRequests(
                f"{self._all[kind]} {kind} are waiting for the model, and at most "
                f"{self._limits[kind]} may; try again later.",
                code=code,
                retry_after=self._time_to_drain(kind, over),
            )

    def enter(
        self,
        tenant: bytes,
        requests: int,
        tokens: int,
        spending: Spending | None = None,
        visual: int = 0,
    ) -> "Place":
        """Count a request, so many choices with one prompt, ``visual`` tokens of which show
        something, and begin its ``spending``, which whoever enters must end. Raises
        TooManyRequests, and InvalidRequest where the key's limits are too small for it."""
        self.check(tenant, requests, tokens)
        return self._place(tenant, requests, tokens, spending, visual)

    def together(self, check: Callable[[], None]) -> "Together":
        """A door for a request whose parts enter one by one, and are let in or refused as one: a
        part must not be kept out by those before it. ``check`` raises where they are refused."""
        return Together(self, check)

    def _place(
        self, tenant: bytes, requests: int, tokens: int, spending: Spending | None, visual: int
    ) -> "Place":
        if spending is not None:
            spending.begin()
        self._count(tenant, requests, tokens, visual)
        return Place(self, tenant, requests, tokens, visual)

    def _has_part(self, tenant: bytes, kind: str, more: int) -> bool:
        own = self._tenants.get(tenant)
        return own is None or own[kind] + more <= self._limits[kind] / len(self._tenants)

    def _time_to_drain(self, kind: str, amount: int) -> int:
        """Seconds until ``amount`` less waits, if it goes on as in the last minute."""
        now = self._clock()
        while self._history and self._history[0][0] < now - WINDOW:
            self._history.popleft()
        if not self._history:
            return UNKNOWN
        since, before = self._history[0]
        drained = self._drained[kind] - before[kind]
        seconds = amount * max(now - since, 1.0) / max(drained, 1)
        return max(1, min(WINDOW, math.ceil(seconds)))

    def _drain(self, requests: int, tokens: int) -> None:
        self._history.append((self._clock(), self._drained.copy()))
        self._drained.update(requests=requests, tokens=tokens)

    def _count(self, tenant: bytes, requests: int, tokens: int, visual: int) -> None:
        own = self._tenants.setdefault(tenant, collections.Counter())
        for counts in (self._all, own):
            counts.update(requests=requests, tokens=tokens, visual=visual)
        if not own["requests"]:
            del self._tenants[tenant]


class Together:
    """The door for the parts of one request. The first that enters is checked for all of them, then
    and not before: others may have entered since the request was prepared."""

    def __init__(self, backlog: Backlog, check: Callable[[], None]) -> None:
        self._backlog = backlog
        self._check = check
        self._is_checked = False
        self._refusal: ServiceError | None = None

    def enter(
        self,
        tenant: bytes,
        requests: int,
        tokens: int,
        spending: Spending | None = None,
        visual: int = 0,
    ) -> "Place":
        """As that of the backlog."""
        if not self._is_checked:
            self._is_checked = True
            try:
                self._check()
            except ServiceError as error:
                self._refusal = error
        if self._refusal is not None:
            raise self._refusal
        return self._backlog._place(tenant, requests, tokens, spending, visual)


class Place:
    """The share of one chat request, until all its choices have begun or it has ended."""

    def __init__(
        self, backlog: Backlog, tenant: bytes, requests: int, tokens: int, visual: int
    ) -> None:
        self._backlog = backlog
        self._tenant = tenant
        self._requests = requests
        self._tokens = tokens
        self._visual = visual

    def begin(self) -> None:
        """A choice has its first token; the prompt that all share was computed for the first."""
        self._backlog._drain(1, self._tokens)
        self._give_back(1)

    def leave(self) -> None:
        """The request has ended, whether it had begun or not."""
        if self._requests:
            self._give_back(self._requests)

    def _give_back(self, requests: int) -> None:
        self._backlog._count(self._tenant, -requests, -self._tokens, -self._visual)
        self._requests -= requests
        self._tokens = self._visual = 0
