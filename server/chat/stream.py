"""From engine outputs to chunks. The answer without streaming is a fold over the same chunks, so
the two can never disagree."""

import asyncio
import collections
import contextlib
import copy
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from engine.client import EngineClient
from server.backlog import Backlog, Together
from server.chat.choices import Choices
from server.chat.detokenize import Detokenizer
from server.chat.prepare import PreparedChat
from server.chat.sse import DONE
from server.chat.stops import StopMatcher
from server.chat.tools import CallArguments, CallStart, Piece, ToolParser
from server.chat.tracing import Generation
from server.chat.usage import Meter
from server.metrics import Metrics
from server.schemas.answer import (
    AnswerMessage,
    Box,
    Choice,
    Chunk,
    ChunkChoice,
    Comparison,
    Completion,
    Delta,
    FunctionAnswer,
    FunctionDelta,
    ToolCallAnswer,
    ToolCallDelta,
)
from server.schemas.common import (
    Logprobs,
    PromptLogprob,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from wire.errors import EngineFailed, InvalidRequest, ServiceError
from wire.messages import EngineOutput, TokenLogprobs

logger = logging.getLogger(__name__)

C = TypeVar("C", bound="HasUsage")

Part = tuple[Delta, Logprobs | None]
"""More of an answer, and the tokens since the part before it."""

# JSON has no infinity; OpenAI writes this number for it.
LEAST = -9999.0


class ChoiceState:
    """One answer on its way: ids in, deltas out. ``finish_reason`` is set when it is over, and
    ``stop_reason`` if it is the client's own stop string or token that ended it. ``logprob`` is the
    sum over all tokens, the one that ended it too, where log-probabilities are known."""

    def __init__(self, chat: PreparedChat) -> None:
        self._detokenizer = Detokenizer(
            chat.model.tokenizer,
            skip_special_tokens=chat.skip_special_tokens,
            continues=chat.continues,
        )
        self._stops = StopMatcher(chat.stops, show=chat.show_stop)
        self._show_stop = chat.show_stop
        self._min_tokens = chat.engine.sampling.min_tokens
        self._boxes = copy.copy(chat.boxes)
        self._tools = ToolParser() if chat.parse_tools else None
        self._max_calls = chat.max_calls
        self._called_reason = chat.called_reason
        self._calls = 0
        self._tokenizer = chat.model.tokenizer
        self._logprobs: list[TokenLogprob] = []
        self._shows_logprobs = chat.shows_logprobs
        self._token_ids: list[int] | None = [] if chat.token_ids else None
        self._eos = chat.model.ready.eos_token_ids
        self.finish_reason: str | None = None
        self.stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET
        self.completion_tokens = 0
        self.logprob = 0.0

    def feed(self, output: EngineOutput) -> list[Part]:
        """What ``output`` adds to the answer. How tokens are spread over outputs makes no
        difference to the whole, nor to which part a token belongs."""
        before = self.completion_tokens
        parts: list[Part] = []
        for index, token in enumerate(output.token_ids):
            self.completion_tokens += 1
            likely = None if output.logprobs is None else output.logprobs[index]
            if likely is not None:
                self.logprob += max(likely.logprob, LEAST)
            if token == output.stop_token and not self._show_stop:
                break  # the last one
            if likely is not None and self._shows_logprobs:
                self._logprobs.append(self._likely(token, likely))
            parts += [(delta, self.take_logprobs()) for delta in self._add(token)]
            if self.finish_reason is not None:
                break
        if output.finish_reason is not None and self.finish_reason is None:
            if output.stop_token is not None and output.stop_token not in self._eos:
                self.stop_reason = output.stop_token
            parts += [(delta, self.take_logprobs()) for delta in self._end(output.finish_reason)]
        if self._token_ids is not None:
            self._token_ids += output.token_ids[: self.completion_tokens - before]
        return parts if len(parts) < 2 else _joined(parts)

    def _add(self, token: int) -> list[Delta]:
        text = self._detokenizer.push((token,))
        if self.completion_tokens >= self._min_tokens:
            text = self._stops.push(text)
        deltas = self._deltas(text)
        if boxes := self._boxes.push((token,)):
            deltas.append(Delta(boxes=boxes))
        return deltas + self._end("stop") if self._stops.stopped else deltas

    def _end(self, reason: str) -> list[Delta]:
        """What was held back, and why there is no more."""
        text = ""
        if not self._stops.stopped:
            text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if self._stops.found is not None:
            reason, self.stop_reason = "stop", self._stops.found
        deltas = self._deltas(text)
        if self._tools is not None and self.finish_reason is None:
            deltas += self._show(self._tools.flush(complete=reason == "stop"))
        if self.finish_reason is None:
            called = self._calls and reason == "stop"
            self.finish_reason = self._called_reason if called else reason
        return deltas

    def _likely(self, token: int, found: TokenLogprobs) -> TokenLogprob:
        shown = self._tokenizer.shown
        top = []
        for other, logprob in found.top:
            text, data = shown(other)
            top.append(TopLogprob(text, logprob if logprob > LEAST else LEAST, data))
        text, data = shown(token)
        return TokenLogprob(text, max(found.logprob, LEAST), data, top)

    def take_token_ids(self) -> list[int] | msgspec.UnsetType:
        """Those since the last call, if they are wanted."""
        if self._token_ids is None:
            return msgspec.UNSET
        taken, self._token_ids = self._token_ids, []
        return taken

    def take_logprobs(self) -> Logprobs | None:
        """Those of the tokens since the last call; None if there are none."""
        if not self._logprobs:
            return None
        taken, self._logprobs = self._logprobs, []
        return Logprobs(taken)

    def _deltas(self, text: str) -> list[Delta]:
        if self._tools is not None:
            return self._show(self._tools.push(text))
        return [Delta(content=text)] if text else []

    def _show(self, pieces: list[Piece]) -> list[Delta]:
        deltas = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append(Delta(content=piece))
            elif isinstance(piece, CallStart):
                start = FunctionDelta("", piece.name)
                call = ToolCallDelta(self._calls, start, piece.id, "function")
                deltas.append(Delta(tool_calls=[call]))
                self._calls += 1
            elif isinstance(piece, CallArguments):
                more = ToolCallDelta(self._calls - 1, FunctionDelta(piece.text))
                deltas.append(Delta(tool_calls=[more]))
            elif self._calls == self._max_calls:
                self.finish_reason = self._called_reason
                break
        return deltas


def _joined(parts: list[Part]) -> list[Part]:
    """With neighbouring texts as one."""
    joined = parts[:1]
    for delta, logprobs in parts[1:]:
        before, likely = joined[-1]
        if isinstance(before.content, str) and isinstance(delta.content, str):
            before.content += delta.content
            if logprobs is not None and likely is not None:
                likely.content += logprobs.content
            else:
                joined[-1] = before, likely or logprobs
        else:
            joined.append((delta, logprobs))
    return joined


async def chunks(
    chat: PreparedChat,
    engine: EngineClient,
    backlog: Backlog | Together,
    metrics: Metrics,
    began: float,
    states: Sequence[ChoiceState] = (),
) -> AsyncGenerator[Chunk, None]:
    """Generate, and yield the answer piece by piece; the last chunk holds the usage. ``states``, if
    there are any, are those of its choices, for who wants to look at them.

    Raises TooManyRequests before anything else if too much is waiting.

    Closing the generator, or ending early at a stop string, aborts the request in the engine.
    ``began`` is the ``time.monotonic`` of the request's arrival.
    """
    states = states or [ChoiceState(chat) for _ in range(chat.n)]
    choices = Choices(chat, engine)
    meter = chat.meter
    created = int(time.time())

    def chunk(
        index: int,
        delta: Delta,
        logprobs: Logprobs | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET,
    ) -> Chunk:
        token_ids = states[index].take_token_ids()
        choice = ChunkChoice(delta, index, logprobs, finish_reason, stop_reason, token_ids)
        return Chunk(chat.engine.id, created, chat.model.name, [choice])

    length, visual = len(chat.engine.prompt), sum(item.length for item in chat.engine.items)
    place = backlog.enter(chat.engine.tenant, chat.n, length, chat.spending, visual)
    metrics.prompt_tokens.add(length)
    metrics.prompt_length.observe(length)
    unfinished = "abort"
    begun = False
    generation = Generation(chat, engine)
    try:
        async with contextlib.aclosing(choices.outputs()) as outputs:
            async for index, output in outputs:
                _check(output)
                meter.add(index, output)
                state = states[index]
                if not state.completion_tokens:
                    place.begin()  # first: a reader may take its time with what is yielded
                    generation.begin(index, output)
                if not begun:
                    begun = True
                    metrics.time_to_first_token.observe(time.monotonic() - began)
                    for first in await _beginnings(chat, output, chunk):
                        yield first
                before = state.completion_tokens
                parts = state.feed(output)
                metrics.generation_tokens.add(state.completion_tokens - before)
                for delta, logprobs in parts:
                    yield chunk(index, delta, logprobs)
                if state.finish_reason is not None:
                    await choices.end(index)
                    generation.end(index, state)
                    logprobs = state.take_logprobs()
                    yield chunk(index, Delta(), logprobs, state.finish_reason, state.stop_reason)
        if any(state.finish_reason is None for state in states):
            raise EngineFailed("The engine could not finish this request.")
        completion = sum(state.completion_tokens for state in states)
        usage = meter.usage(len(chat.engine.prompt), completion)
        yield Chunk(chat.engine.id, created, chat.model.name, [], usage)
    except Exception as error:
        generation.fail(error)
        unfinished = _ending(error)
        raise
    finally:
        # Exceptions and frames may hold each other, and us, until the garbage collector comes by:
        # it counts objects, not the megabytes in them.
        chat.buffers.clear()
        place.leave()
        generation.close(states, meter.cached)
        chat.spending.end(sum(state.completion_tokens for state in states))
        _count(metrics, meter, states, unfinished)
        metrics.e2e_latency.observe(time.monotonic() - began)


def _ending(error: Exception) -> str:
    """Why choices end that an error ends. What is not of our tree is a bug."""
    if isinstance(error, InvalidRequest):
        return "stuck"
    is_fault = isinstance(error, EngineFailed) or not isinstance(error, ServiceError)
    return "error" if is_fault else "abort"


def _count(metrics: Metrics, meter: Meter, states: Sequence[ChoiceState], unfinished: str) -> None:
    """What became of the choices; those that have not ended are ``unfinished``."""
    for state in states:
        metrics.finished.add(state.finish_reason or unfinished)
        metrics.generation_length.observe(state.completion_tokens)
    for timings in meter.stopwatch.timings.values():
        metrics.queue_time.observe(timings.queue)
        metrics.prefill_time.observe(timings.prefill)
        metrics.decode_time.observe(timings.decode)
        metrics.inference_time.observe(timings.inference)
        if (more := timings.tokens - 1) > 0:
            metrics.time_per_token.observe(timings.decode / more)
    for seconds in meter.encoded():
        metrics.media_encode.observe(seconds)


async def _beginnings(
    chat: PreparedChat, output: EngineOutput, chunk: Callable[[int, Delta], Chunk]
) -> list[Chunk]:
    """What stands before the answers. All begin at once, in order: OpenAI's client expects it."""
    first = [chunk(index, Delta(role="assistant", content="")) for index in range(chat.n)]
    await _tell_prompt(first[0], chat, output)
    if chat.echo:
        first += [chunk(index, Delta(content=chat.echo)) for index in range(chat.n)]
    return first


async def _tell_prompt(first: Chunk, chat: PreparedChat, output: EngineOutput) -> None:
    """Add what is wanted of the prompt to the chunk that stands before all others."""
    if chat.token_ids:
        first.prompt_token_ids = chat.engine.prompt
    if output.prompt_logprobs is not None:
        # Thousands of entries: other streams go on meanwhile.
        first.prompt_logprobs = await asyncio.to_thread(_prompt_logprobs, chat, output)


def _prompt_logprobs(
    chat: PreparedChat, output: EngineOutput
) -> list[dict[str, PromptLogprob] | None]:
    """One entry per token of the prompt, as vLLM has them: by token id, the prompt's own first.
    Nothing is before the first token, so it has none."""
    tokenizer = chat.model.tokenizer

    def entry(token: int, logprob: float, rank: int) -> PromptLogprob:
        text, _ = tokenizer.shown(token)
        return PromptLogprob(max(logprob, LEAST), rank, text)

    entries: list[dict[str, PromptLogprob] | None] = [None]
    for token, found in zip(chat.engine.prompt[1:], output.prompt_logprobs or (), strict=True):
        place = {str(token): entry(token, found.logprob, found.rank)}
        for rank, (likely, logprob) in enumerate(found.top, 1):
            place.setdefault(str(likely), entry(likely, logprob, rank))
        entries.append(place)
    return entries


def _check(output: EngineOutput) -> None:
    if output.finish_reason == "stuck":
        # Not "stop": the answer may be cut off anywhere, and the model did not choose to end it.
        raise InvalidRequest(
            "The parameters of this request (allowed_token_ids, bad_words, min_tokens, or what the "
            "answer must be) leave no token to go on with.",
            code="no_token_left",
        )
    if output.finish_reason == "error":
        logger.error("the engine ended request %s: %s", output.id, output.error)
        raise EngineFailed("The engine could not finish this request.")


class HasUsage(Protocol):
    """A chunk of any dialect that can hold usage."""

    usage: Usage | msgspec.UnsetType | None


async def events(
    source: AsyncGenerator[C, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The chunks as events, in the two forms OpenAI knows: with usage everywhere, or nowhere.
    ``source`` is closed with it."""
    encoder = msgspec.json.Encoder()
    async with contextlib.aclosing(source):
        async for chunk in source:
            if include_usage:
                if chunk.usage is msgspec.UNSET:
                    chunk.usage = None
            elif chunk.usage is not msgspec.UNSET:
                continue
            yield b"data: " + encoder.encode(chunk) + b"\n\n"
    yield DONE


async def fold(source: AsyncGenerator[Chunk, None]) -> Completion:
    """The whole answer; ``source`` is closed."""
    answers: dict[int, Answer] = collections.defaultdict(Answer)
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    best_of: Comparison | msgspec.UnsetType = msgspec.UNSET
    async with contextlib.aclosing(source):
        async for chunk in source:
            if chunk.prompt_logprobs is not msgspec.UNSET:
                prompt_logprobs = chunk.prompt_logprobs
            if chunk.prompt_token_ids is not msgspec.UNSET:
                prompt_token_ids = chunk.prompt_token_ids
            if chunk.best_of is not msgspec.UNSET:
                best_of = chunk.best_of
            for part in chunk.choices:
                answers[part.index].add(part)
            if isinstance(chunk.usage, Usage):
                choices = [answers[index].choice(index) for index in sorted(answers)]
                whole = Completion(chunk.id, chunk.created, chunk.model, choices, chunk.usage)
                whole.prompt_logprobs = prompt_logprobs
                whole.prompt_token_ids = prompt_token_ids
                whole.best_of = best_of
                return whole
    raise EngineFailed("The engine could not finish this request.")


class Answer:
    """One choice, put together again."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._calls: list[ToolCallAnswer] = []
        self._boxes: list[Box] = []
        self._logprobs: Logprobs | None = None
        self._token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
        self._finish_reason = ""
        self._stop_reason: str | int | msgspec.UnsetType = msgspec.UNSET

    def add(self, part: ChunkChoice) -> None:
        """Take in more of it."""
        if isinstance(part.delta.content, str):
            self._texts.append(part.delta.content)
        for call in part.delta.tool_calls or ():
            if isinstance(call.id, str) and isinstance(call.function.name, str):
                self._calls.append(ToolCallAnswer(call.id, FunctionAnswer(call.function.name, "")))
            self._calls[call.index].function.arguments += call.function.arguments
        self._boxes += part.delta.boxes or ()
        if part.logprobs is not None:
            self._logprobs = self._logprobs or Logprobs([])
            self._logprobs.content += part.logprobs.content
        if part.token_ids is not msgspec.UNSET:
            self._token_ids = self._token_ids or []
            self._token_ids += part.token_ids
        if part.finish_reason is not None:
            self._finish_reason, self._stop_reason = part.finish_reason, part.stop_reason

    def choice(self, index: int) -> Choice:
        """All of it."""
        message = AnswerMessage(content="".join(self._texts) or (None if self._calls else ""))
        if self._calls:
            message.tool_calls = self._calls
        if self._boxes:
            message.boxes = self._boxes
        return Choice(
            message,
            self._finish_reason,
            index,
            self._logprobs,
            self._stop_reason,
            self._token_ids,
        )
