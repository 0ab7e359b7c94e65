"""The open requests of one engine client: what was asked, what has come back, what is sent again.

They outlive the engine. When one dies, ``disconnect`` is called, and ``connect`` when the next is
ready: every request that had not ended is sent again with the tokens it has been given, and its
reader sees a pause. A request that kills engines must not be sent for ever, and must not take the
others along; so what was being computed at a death is under suspicion, and suspects are sent one
at a time, before anything else, each until it got some tokens and makes room for the next, which
is sent when the engine has reported itself empty. The one on trial when an engine dies is the
culprit: it fails, and the others are cleared.

A successor may have less room; a request that has grown beyond it ends with "length".
"""

import asyncio
import itertools
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from wire.channel import Buffer
from wire.errors import ClientTooSlow, EngineFailed, ServiceError
from wire.histogram import TOKEN_SECONDS, Histogram
from wire.logs import about, request_id
from wire.messages import Abort, EngineOutput, EngineRequest, StepReport, Times

logger = logging.getLogger(__name__)

Send = Callable[[EngineRequest | Abort, Sequence[Buffer]], None]

# Each further trial of a stream is so much longer, for what kills late.
_LONGER = 8
# Tokens after which all suspicion is forgotten.
_CLEARED = 256
# Outputs that wait for a reader before they are joined: one is kept in far less memory.
_JOINED = 64


class _Stream:
    """One request, its outputs on their way to its reader, and what ended it early."""

    def __init__(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        self.request = msgspec.structs.replace(request, origin=request_id.get())
        self.buffers = buffers
        self.token_ids = _compact([])  # all that were generated
        self.deaths = 0
        self.tried = False  # has passed its trial since the last death
        self.sent_length = 0  # of token_ids, when the request was sent last
        self.lost = False  # with its engine, and not sent again yet
        self.asked_at = time.monotonic()
        self.waited = 0.0  # until it was sent last, for an engine
        self.first_at = 0.0  # when its first token arrived, and
        self.last_at: float | None = None  # when its last one did
        self.outputs: list[EngineOutput] = []
        self.error: ServiceError | None = None
        self.arrived = asyncio.Event()

    def add(self, output: EngineOutput) -> bool:
        """Keep ``output`` for the reader; whether there were many and have been joined."""
        self.outputs.append(output)
        self.arrived.set()
        joined = len(self.outputs) >= _JOINED
        if joined:
            self.outputs = _merged(self.outputs, _compact)
        return joined

    def fail(self, error: ServiceError) -> None:
        """End with an error, after the outputs already dealt."""
        self.error = error
        self.arrived.set()


def _compact(token_ids: Iterable[int]) -> "array[int]":
    """In four bytes each, not forty."""
    return array("i", token_ids)


def _merged(
    outputs: list[EngineOutput], ids: Callable[[Iterable[int]], Any] = list
) -> list[EngineOutput]:
    """As one with ``ids`` of tokens, so that a reader that is slow has less to do per token; but
    what came before an error is read before it."""
    if not outputs or (len(outputs) == 1 and type(outputs[0].token_ids) is ids):
        return outputs
    last = outputs[-1]
    if last.error is not None or last.finish_reason in ("stuck", "error"):
        return [*_merged(outputs[:-1], ids), last]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    seconds = [output.encode_seconds for output in outputs if output.encode_seconds is not None]
    times = [output.times for output in outputs if output.times is not None]
    whole = EngineOutput(
        last.id,
        ids(itertools.chain.from_iterable(output.token_ids for output in outputs)),
        last.finish_reason,
        last.stop_token,
        max(output.cached_tokens for output in outputs),
        logprobs=logprobs or None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        encode_seconds=[sum(item) for item in zip(*seconds, strict=True)] or None,
        times=Times(times[0].queue, times[0].prefill, times[-1].decode) if times else None,
    )
    return [whole]


def _size(output: EngineOutput) -> int:
    """Tokens and log-probabilities."""
    return len(output.token_ids) + sum(1 + len(entry.top) for entry in output.logprobs or ())


class Streams:
    """Deals out reports, one wake-up per request and step.

    A reader that is slow finds all its outputs as one; no token is dropped and nobody else waits
    for it. One that leaves more than ``max_unread`` tokens and log-probabilities unread gets an
    error behind them. ``send`` must neither block nor fail; it is called only between ``connect``
    and ``disconnect``. ``check`` raises if there will be no engine. ``trial`` is how many tokens
    end a first trial well.
    """

    def __init__(
        self,
        send: Send,
        *,
        check: Callable[[], None] = lambda: None,
        trial: int = 8,
        max_unread: int = 1 << 15,
    ) -> None:
        self._send = send
        self._check = check
        self._trial_length = trial
        self._max_unread = max_unread
        self._connected = False
        # Both in order of arrival; what has ended for the engine is in neither.
        self._open: dict[str, _Stream] = {}
        self._unsent: dict[str, _Stream] = {}
        self._trial: _Stream | None = None
        # One that has passed its trial was aborted, and the engine may not know it yet.
        self._emptying = False
        self._max_model_len: int | None = None
        self.gaps = Histogram(TOKEN_SECONDS)
        """Seconds between the arrivals of a request's tokens."""
        self.resumed = 0
        """How often a request went on in the successor of a lost engine."""
        self.convicted = 0
        """Requests given up because engines died of them."""

    @property
    def at_work(self) -> bool:
        """Whether the engine owes a report."""
        return self._emptying or len(self._open) > len(self._unsent)

    async def read(
        self, request: EngineRequest, buffers: Sequence[Buffer]
    ) -> AsyncGenerator[EngineOutput, None]:
        """Send ``request``, yield its outputs, and send an Abort if the reader leaves early.

        Ids must be unique among the open requests.
        """
        self._check()
        if request.id in self._open:
            raise ValueError("a request with this id is open")
        stream = self._open[request.id] = self._unsent[request.id] = _Stream(request, buffers)
        try:
            self._send_on()
            while True:
                await stream.arrived.wait()
                stream.arrived.clear()
                outputs, stream.outputs = stream.outputs, []
                for output in _merged(outputs):
                    yield output
                    if output.finish_reason is not None:
                        return
                if stream.error is not None and not stream.outputs:
                    raise stream.error
        finally:
            # Absent if it has ended or failed, in which case nobody is there to be told.
            if self._open.pop(request.id, None) is not None:
                self._leave(stream)

    def abort(self, name: str, error: ServiceError) -> bool:
        """End an open request now, whether its reader comes or not: it reads ``error`` next. False
        if there is none of this name."""
        stream = self._open.pop(name, None)
        if stream is None:
            return False
        self._leave(stream)
        stream.outputs.clear()
        stream.fail(error)
        return True

    def _leave(self, stream: _Stream) -> None:
        name = stream.request.id
        if self._unsent.pop(name, None) is None:
            self._send(Abort([name]), ())
        if stream is self._trial:
            self._trial = None
            self._send_on()

    def deal(self, report: StepReport) -> None:
        """Hand each output to its reader; those of aborted requests are dropped."""
        if report.stats.running == report.stats.waiting == 0:
            self._emptying = False
        now = time.monotonic()
        for output in report.outputs:
            self._give(output, now)
        self._send_on()

    def _give(self, output: EngineOutput, now: float) -> None:
        stream = self._open.get(output.id)
        if stream is None:
            return
        if output.token_ids:
            times = output.times
            if stream.last_at is None:
                stream.first_at = now
                if times is not None:
                    times = msgspec.structs.replace(times, queue=times.queue + stream.waited)
            else:
                together = len(output.token_ids)
                self.gaps.observe((now - stream.last_at) / together, together)
                if times is None:  # the engine's end, which tells it, may never be read
                    times = Times(decode=now - stream.first_at)
            output = msgspec.structs.replace(output, times=times)
            stream.last_at = now
        stream.token_ids.fromlist(output.token_ids)
        joined = stream.add(output)
        if output.finish_reason is not None:
            del self._open[output.id]
            self._unsent.pop(output.id, None)
            if stream is self._trial:
                self._trial = None
            return
        made = len(stream.token_ids) - stream.sent_length
        enough = self._trial_length * _LONGER ** (stream.deaths - 1)
        if stream is self._trial and made >= enough:
            self._pass(stream)
        if made >= _CLEARED:
            stream.deaths = 0
        if joined and _size(stream.outputs[0]) > self._max_unread:
            self._give_up(stream)

    def _give_up(self, stream: _Stream) -> None:
        """Its reader reads too slowly."""
        with about(stream.request.origin):
            logger.info("request=%s is ended: its answer is not read", stream.request.id)
        del self._open[stream.request.id]
        self._leave(stream)
        stream.fail(ClientTooSlow("The answer was read too slowly; the request has been ended."))

    def _pass(self, stream: _Stream) -> None:
        """It has stood its trial; it makes room for that of the next, which must be alone too.

        Until the engine is empty, its death may still be this one's doing, outputs of this one may
        still come, and its id is not free.
        """
        self._trial = None
        stream.tried = True
        if self._next_suspect() is not None:
            self._send(Abort([stream.request.id]), ())
            self._unsent[stream.request.id] = stream
            self._emptying = True

    def _next_suspect(self) -> _Stream | None:
        return next((s for s in self._unsent.values() if s.deaths and not s.tried), None)

    def connect(self, max_model_len: int | None = None) -> None:
        """An engine is ready, for so many tokens of prompt and completion: send what is open."""
        self._connected = True
        self._max_model_len = max_model_len
        self._send_on()

    def disconnect(self, suspects: Collection[str] = ()) -> None:
        """The engine is gone. ``suspects`` are the ids it was computing, if it could tell."""
        self._connected = False
        sent = [stream for name, stream in self._open.items() if name not in self._unsent]
        # Those that were named may all have left since: then nobody here is to blame.
        suspected = [s for s in sent if s.request.id in suspects] if suspects else sent
        if self._trial in suspected:
            self._convict(self._trial)
            for stream in self._open.values():
                stream.deaths = 0
        else:
            for stream in suspected:
                stream.deaths += 1
        for stream in self._open.values():
            stream.tried = False
        for stream in sent:
            stream.lost = True
        self._trial = None
        self._emptying = False
        self._unsent = dict(self._open)

    def fail(self, make_error: Callable[[], ServiceError]) -> None:
        """End every open request with an error of its own."""
        self._connected = False
        streams, self._open, self._unsent, self._trial = self._open, {}, {}, None
        for stream in streams.values():
            stream.fail(make_error())

    def abort_all(self, make_error: Callable[[], ServiceError]) -> int:
        """End every open request, each with an error of its own; how many there were."""
        sent = [name for name in self._open if name not in self._unsent]
        streams, self._open, self._unsent, self._trial = self._open, {}, {}, None
        if sent:
            self._send(Abort(sent), ())
        for stream in streams.values():
            stream.fail(make_error())
        return len(streams)

    def _convict(self, stream: _Stream) -> None:
        with about(stream.request.origin):
            logger.error("request=%s is given up: engines die of it", stream.request.id)
        self.convicted += 1
        del self._open[stream.request.id]
        stream.fail(EngineFailed("the engine failed during this request"))

    def _send_on(self) -> None:
        """Send what may be sent now: suspects first and alone, then the others."""
        while self._connected and self._unsent and not self._emptying and self._trial is None:
            suspect = self._next_suspect()
            if suspect is not None:
                del self._unsent[suspect.request.id]
                self._trial = suspect
                self._resend(suspect)
            else:
                unsent, self._unsent = self._unsent, {}
                for stream in unsent.values():
                    self._resend(stream)

    def _resend(self, stream: _Stream) -> None:
        request = stream.request
        length, limit = len(request.prompt) + len(stream.token_ids), self._max_model_len
        if stream.token_ids and limit is not None and length >= limit:
            self._give(EngineOutput(request.id, [], "length"), time.monotonic())
            return
        stream.waited = time.monotonic() - stream.asked_at
        self.resumed += stream.lost
        stream.lost = False
        stream.sent_length = len(stream.token_ids)
        if stream.token_ids:
            request = msgspec.structs.replace(request, output=list(stream.token_ids))
            with about(request.origin):
                logger.info("request=%s goes on behind %d tokens", request.id, stream.sent_length)
        # What is on its way to the engine does not change when the reader's list is cleared.
        self._send(request, tuple(stream.buffers))
