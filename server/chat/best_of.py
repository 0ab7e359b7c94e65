"""The best of several answers: all are generated, compared by a critic, and one is returned. Where
the answer is a stream, the winner comes in one piece, when it is known."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from engine.client import EngineClient
from server.backlog import Backlog
from server.chat.critic import Contest
from server.chat.prepare import PreparedChat
from server.chat.stream import Answer, ChoiceState, chunks
from server.chat.vote import final_answer
from server.metrics import Metrics
from server.schemas.answer import (
    Candidate,
    Choice,
    Chunk,
    ChunkChoice,
    Comparison,
    Delta,
    FunctionDelta,
    ToolCallDelta,
)
from server.schemas.common import BestOfUsage, Usage
from wire.errors import ContextTooLong, EngineFailed
from wire.spans import span


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The candidates, which of them has won, and the tokens that a critic read and found cached."""

    candidates: list[Candidate]
    winner: int
    read: int = 0
    cached: int = 0


async def best(
    chat: PreparedChat,
    contest: Contest,
    engine: EngineClient,
    backlog: Backlog,
    metrics: Metrics,
    began: float,
    preparing: Callable[[], AbstractAsyncContextManager[None]],
) -> AsyncGenerator[Chunk, None]:
    """As ``chunks``, for a chat of which one answer is wanted. ``preparing`` is what a critic is
    asked in: it ends it when the server, or an operator, has no more time for it.

    Raises Unavailable where the critic cannot be asked, and ContextTooLong where no answer fits in
    its context.
    """
    states = [ChoiceState(chat) for _ in range(chat.n)]
    answers = [Answer() for _ in states]
    usage: Usage | msgspec.UnsetType | None = None
    created = 0
    async with contextlib.aclosing(chunks(chat, engine, backlog, metrics, began, states)) as source:
        async for chunk in source:
            if not created:
                created = chunk.created
                yield chunk  # the role, and what was asked of the prompt
            for part in chunk.choices:
                answers[part.index].add(part)
            usage = chunk.usage
    if not isinstance(usage, Usage):
        raise EngineFailed("The engine could not finish this request.")
    since = time.monotonic()
    choices = [answer.choice(0) for answer in answers]
    async with preparing(), chat.handle.preparing():
        with span("critic", {"internvl.critic": contest.asked.critic}):
            compared = await _compare(chat, contest, states, choices)
    metrics.critic_time.observe(time.monotonic() - since)
    metrics.compared.add(contest.asked.critic)
    chat.spending.add(compared.read)
    usage.best_of = BestOfUsage(
        candidate_tokens=usage.completion_tokens,
        winner_tokens=states[compared.winner].completion_tokens,
        shared_tokens=chat.meter.shared,
        critic_tokens=compared.read,
        critic_cached_tokens=compared.cached,
    )
    for last, part in enumerate(_parts(choices[compared.winner])):
        piece = Chunk(chat.engine.id, created, chat.model.name, [part])
        if last:
            piece.best_of = _told(contest, compared, choices)
        yield piece
    yield Chunk(chat.engine.id, created, chat.model.name, [], usage)


def _parts(choice: Choice) -> list[ChunkChoice]:
    """A whole answer as two chunks."""
    message = choice.message
    delta = Delta()
    if message.content:
        delta.content = message.content
    if message.tool_calls is not msgspec.UNSET:
        delta.tool_calls = [
            ToolCallDelta(
                index,
                FunctionDelta(call.function.arguments, call.function.name),
                call.id,
                call.type,
            )
            for index, call in enumerate(message.tool_calls)
        ]
    delta.boxes = message.boxes
    return [
        ChunkChoice(delta, 0, choice.logprobs, token_ids=choice.token_ids),
        ChunkChoice(Delta(), 0, None, choice.finish_reason, choice.stop_reason),
    ]


def _told(
    contest: Contest, compared: _Compared, choices: Sequence[Choice]
) -> Comparison | msgspec.UnsetType:
    asked = contest.asked
    if asked.return_scores is False and not asked.return_texts:
        return msgspec.UNSET
    if asked.return_texts:
        for candidate, choice in zip(compared.candidates, choices, strict=True):
            candidate.content = choice.message.content
    return Comparison(asked.critic, compared.winner, compared.candidates)


async def _compare(
    chat: PreparedChat, contest: Contest, states: Sequence[ChoiceState], choices: Sequence[Choice]
) -> _Compared:
    candidates = [
        Candidate(index, None, choice.finish_reason, state.completion_tokens)
        for index, (state, choice) in enumerate(zip(states, choices, strict=True))
    ]
    texts = [choice.message.content or "" for choice in choices]
    if contest.critic is not None and contest.case is not None:
        verdicts = await contest.critic.judge(chat.engine, contest.case, texts)
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            candidate.score = verdict.score
            candidate.steps = verdict.steps
        if all(candidate.score is None for candidate in candidates):
            raise ContextTooLong(
                contest.critic.ready.max_model_len,
                "this is the critic's, and every answer is too long for it.",
                param="messages",
            )
        read, cached = sum(v.tokens for v in verdicts), sum(v.cached for v in verdicts)
        return _Compared(candidates, _first(candidates), read, cached)
    for candidate, state in zip(candidates, states, strict=True):
        candidate.logprob = candidate.score = state.logprob / max(state.completion_tokens, 1)
    if contest.asked.critic == "vote":
        await asyncio.to_thread(_vote, candidates, texts)  # of long texts it takes a while
    return _Compared(candidates, _first(candidates))


def _vote(candidates: Sequence[Candidate], texts: Sequence[str]) -> None:
    """Give each candidate the share that its final answer has."""
    found = []
    for candidate, text in zip(candidates, texts, strict=True):
        whole = candidate.finish_reason != "length"
        candidate.answer = final_answer(text, whole=whole)
        found.append(candidate.answer)
    votes = collections.Counter(answer for answer in found if answer is not None)
    for candidate, answer in zip(candidates, found, strict=True):
        candidate.score = votes[answer] / len(candidates) if answer is not None else 0.0


def _first(candidates: Sequence[Candidate]) -> int:
    """The index of the best: by its score, where these are equal by its log-probability, if that is
    known, and else the first of them."""

    def rank(candidate: Candidate) -> tuple[float, float, int]:
        score = -1e9 if candidate.score is None else candidate.score
        likely = candidate.logprob if isinstance(candidate.logprob, float) else 0.0
        return score, likely, -candidate.index

    return max(candidates, key=rank).index
