"""What each API key may use: requests, tokens and visual tokens a minute, and requests at once.

A limit per minute is a bucket that holds that much and is filled evenly: what was not used can be
used at once, and in any T seconds no more than the limit times (1 + T / 60). A request takes its
tokens when it is given to the engine: those of its prompt, which are known then, and the longest
answer it asks for, or a guess. When it ends, the difference to what it took is given back or taken
too, so that a bucket can owe something; and what is given back adds to those T seconds.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from wire.errors import InvalidRequest, TooManyRequests

MINUTE = 60.0
# Tokens that an answer is taken to have whose length nobody asked for.
GUESS = 256
# Of seconds: what rounding adds up to must keep nobody waiting.
_ROUNDING = 1e-6

Clock = Callable[[], float]


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one key; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    visual_tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None


class RateLimited(TooManyRequests):
    """A key has used what it may. ``type`` is "requests" or "tokens", as OpenAI has it."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, type: str, retry_after: int) -> None:
        super().__init__(message, retry_after=retry_after)
        self.type = type


class Bucket:
    """``limit`` a minute; full at the beginning."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._full_at = clock()

    @property
    def seconds_to_full(self) -> float:
        """0 when it is full; more than a minute when it owes something."""
        return max(0.0, self._full_at - self._clock())

    @property
    def remaining(self) -> int:
        """What may be taken now; 0 when it owes something."""
        share = 1 - (self.seconds_to_full - _ROUNDING) / MINUTE
        return min(self.limit, max(0, math.floor(share * self.limit)))

    def wait(self, amount: int) -> float:
        """Seconds until so much may be taken; more than a full bucket is never there."""
        seconds = self.seconds_to_full + self._time(amount) - MINUTE
        return seconds if seconds > _ROUNDING else 0.0

    def take(self, amount: int) -> None:
        """Take so much, there or not; less than 0 gives back."""
        self._full_at = self._clock() + self.seconds_to_full + self._time(amount)

    def _time(self, amount: int) -> float:
        return amount * MINUTE / self.limit


class Usage(msgspec.Struct):
    """What a key has had since the server started. Refused requests count as such alone."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_tokens: int = 0


class Account:
    """Limits and use of one key. Belongs to one event loop."""

    def __init__(self, name: str = "", *, clock: Clock = time.monotonic) -> None:
        self.name = name
        self.limits = KeyLimits()
        self.usage = Usage()
        self.running = 0
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}

    def limit(self, limits: KeyLimits) -> None:
        """Set other limits; of those that were there the share that is used stays used."""
        self.limits = limits
        wanted = {
            "requests": limits.requests_per_minute,
            "tokens": limits.tokens_per_minute,
            "visual-tokens": limits.visual_tokens_per_minute,
        }
        before, self._buckets = self._buckets, {}
        for kind, limit in wanted.items():
            if limit is not None:
                self._buckets[kind] = before.get(kind) or Bucket(limit, self._clock)
                self._buckets[kind].limit = limit

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs. Raises RateLimited."""
        most = self.limits.max_concurrent_requests
        if most is not None and self.running >= most:
            self._refuse(f"{most} requests of this API key are running", "requests", 1.0)
        self._check("requests", 1)
        self._check("tokens", 1)  # more will be needed, but pictures can be left unfetched now
        self.count()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def count(self) -> None:
        """Count a request that takes no tokens. Raises RateLimited."""
        self._check("requests", 1)
        if "requests" in self._buckets:
            self._buckets["requests"].take(1)
        self.usage.requests += 1

    @property
    def is_limited(self) -> bool:
        """Whether there is something for ``headers`` to say."""
        return bool(self._buckets)

    def headers(self) -> dict[str, str]:
        """The ``x-ratelimit-`` headers of an answer, as OpenAI writes them."""
        headers = {}
        for kind, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(bucket.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_to_full)
        return headers

    def _check(self, kind: str, amount: int) -> None:
        bucket = self._buckets.get(kind)
        if bucket is None:
            return
        seconds = bucket.wait(amount)
        if seconds:
            words = kind.replace("-", " ")
            limit = f"this API key may use {bucket.limit} {words} a minute"
            needs = "" if amount == 1 else f", and this request needs {amount}"
            self._refuse(limit + needs, kind.removeprefix("visual-"), seconds)

    def _refuse(self, reason: str, type: str, seconds: float) -> None:
        self.usage.refused += 1
        wait = math.ceil(seconds - _ROUNDING)
        raise RateLimited(f"Rate limit reached: {reason}. Try again in {wait} s.", type, wait)


class Spending:
    """The tokens of one request: ``prompt``, ``visual`` ones of pictures among them, and at most
    ``answer``. ``fields`` of the request say what the prompt and how long the answer is; None: that
    is a guess."""

    def __init__(
        self,
        account: Account,
        prompt: int,
        visual: int,
        answer: int,
        fields: tuple[str, str | None],
    ) -> None:
        self._account = account
        self._prompt = prompt
        self._visual = visual
        self._answer = answer
        self._prompt_field, self._field = fields
        self._taken: dict[str, int] = {}
        self._open = False

    @classmethod
    def of_all(cls, parts: Sequence["Spending"]) -> "Spending":
        """That of a request which takes the tokens of several, at least one."""
        return cls(
            parts[0]._account,
            sum(part._prompt for part in parts),
            sum(part._visual for part in parts),
            sum(part._answer for part in parts),
            (parts[0]._prompt_field, parts[0]._field),
        )

    def begin(self) -> None:
        """Take the tokens. Raises RateLimited, and InvalidRequest where they never fit."""
        needs = self.check()
        buckets = self._account._buckets
        self._taken = {kind: needs[kind] for kind in buckets if kind in needs}
        for kind, amount in self._taken.items():
            buckets[kind].take(amount)
        usage = self._account.usage
        usage.prompt_tokens += self._prompt
        usage.visual_tokens += self._visual
        self._open = True

    def check(self) -> dict[str, int]:
        """What ``begin`` takes of each kind. Raises what it would."""
        buckets = self._account._buckets
        tokens = self._prompt + self._answer
        if self._field is None and "tokens" in buckets:
            tokens = max(self._prompt + 1, min(tokens, buckets["tokens"].limit))
        needs = {"tokens": tokens, "visual-tokens": self._visual}
        for kind, bucket in buckets.items():
            if needs.get(kind, 0) > bucket.limit:
                raise self._never(kind, needs[kind], bucket.limit)
        for kind, amount in needs.items():
            self._account._check(kind, amount)
        return needs

    def end(self, completion: int) -> None:
        """The answer has had so many tokens, whether it is whole or not. Does nothing for a
        request that has not begun."""
        if not self._open:
            return
        self._open = False
        self._account.usage.completion_tokens += completion
        bucket = self._account._buckets.get("tokens")
        if bucket is not None and "tokens" in self._taken:
            bucket.take(self._prompt + completion - self._taken["tokens"])

    def add(self, tokens: int) -> None:
        """So many more were computed for a request that has ended."""
        bucket = self._account._buckets.get("tokens")
        if bucket is not None and "tokens" in self._taken:
            bucket.take(tokens)

    def _never(self, kind: str, amount: int, limit: int) -> InvalidRequest:
        self._account.usage.refused += 1
        parts = f"{self._prompt} of the prompt, {self._visual} of these for pictures"
        if kind == "tokens":
            answer = f" and {self._answer} for the answer" if self._field else ""
            text = f"This request needs {amount} tokens ({parts}{answer})"
        else:
            text = f"The pictures of this request take {amount} visual tokens"
        return InvalidRequest(
            f"{text}, and this API key may use {limit} a minute: it can never be answered.",
            param=self._field if kind == "tokens" and self._prompt < limit else self._prompt_field,
            code="request_exceeds_rate_limit",
        )


def duration(seconds: float) -> str:
    """As OpenAI writes a time, to the millisecond: "0s", "120ms", "8.64s", "6m0s"."""
    milliseconds = math.ceil(seconds * 1000 - _ROUNDING)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    text += f"{minutes}m" if hours or minutes else ""
    return f"{text}{rest / 1000:g}s"
