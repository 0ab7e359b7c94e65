"""The chunks of prepared chats as those of a completion. Whole answers are a fold over the same."""

import asyncio
import codecs
import collections
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from server.chat.detokenize import Detokenizer
from server.chat.prepare import PreparedChat
from server.schemas.answer import Chunk, ChunkChoice
from server.schemas.common import PromptLogprob, PromptTokensDetails, TokenLogprob, Usage
from server.schemas.completion import (
    CompletionRequest,
    TextChoice,
    TextCompletion,
    TextLogprobs,
)
from wire.errors import EngineFailed

T = TypeVar("T")


async def text_chunks(
    request: CompletionRequest,
    identity: str,
    chats: Sequence[PreparedChat],
    generate: Callable[[PreparedChat], AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[TextCompletion, None]:
    """The answers to all prompts, piece by piece; the last chunk holds the usage. Choice k of
    prompt p has the index p * n + k. Closing the generator ends what runs."""
    prompts = [_Prompt(request, chat, place) for place, chat in enumerate(chats)]
    usages: list[Usage] = []
    async with contextlib.aclosing(_merged([generate(chat) for chat in chats])) as merged:
        async for place, chunk in merged:
            if isinstance(chunk.usage, Usage):
                usages.append(chunk.usage)
                if len(usages) < len(chats):
                    continue
                usage = _sum(usages, silent=request.max_tokens == 0)
                yield TextCompletion(identity, chunk.created, chunk.model, [], usage)
            elif choice := await prompts[place].render(chunk):
                yield TextCompletion(identity, chunk.created, chunk.model, [choice])


async def fold_text(source: AsyncGenerator[TextCompletion, None]) -> TextCompletion:
    """The whole answer; ``source`` is closed."""
    answers: dict[int, list[TextChoice]] = collections.defaultdict(list)
    async with contextlib.aclosing(source):
        async for chunk in source:
            for part in chunk.choices:
                answers[part.index].append(part)
            if isinstance(chunk.usage, Usage):
                chunk.choices = [_whole(answers[index]) for index in sorted(answers)]
                return chunk
    raise EngineFailed("The engine could not finish this request.")


def _whole(parts: Sequence[TextChoice]) -> TextChoice:
    """One choice, put together again; the last part says how it ended."""
    text = "".join(part.text for part in parts)
    likely = [part.logprobs for part in parts if part.logprobs is not None]
    found = TextLogprobs([], [], [], []) if likely else None
    for more in likely:
        for name in TextLogprobs.__struct_fields__:
            getattr(found, name).extend(getattr(more, name))
    first, last = parts[0], parts[-1]
    whole = msgspec.structs.replace(last, text=text, logprobs=found)
    whole.prompt_logprobs, whole.prompt_token_ids = first.prompt_logprobs, first.prompt_token_ids
    if first.token_ids is not msgspec.UNSET:
        whole.token_ids = [token for part in parts for token in part.token_ids or ()]
    return whole


def _sum(usages: Sequence[Usage], *, silent: bool) -> Usage:
    """Of all prompts. Nothing was asked for of what a ``silent`` request generated."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    completion = 0 if silent else sum(usage.completion_tokens for usage in usages)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached, 0))


async def _merged(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """What all of them yield as it comes, each with its source's place; the first error ends all.
    A slow reader holds them up."""
    if len(sources) == 1:  # as nearly always: no task, no queue
        async with contextlib.aclosing(sources[0]) as only:
            async for one in only:
                yield 0, one
        return
    arrived: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue(len(sources))

    async def read(place: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    await arrived.put((place, item))
        except Exception as error:
            await arrived.put((place, error))
        else:
            await arrived.put((place, None))

    readers = [asyncio.create_task(read(*numbered)) for numbered in enumerate(sources)]
    try:
        left = len(readers)
        while left:
            place, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield place, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


class _Offsets:
    """Where in a text tokens begin, in characters; one that goes on in the middle of a character
    begins behind the last whole one."""

    def __init__(self, start: int = 0) -> None:
        self.position = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, data: bytes) -> int:
        """The position of a token with these bytes."""
        begin, (held, _) = self.position, self._decoder.getstate()
        self._add(data[:1])
        if held and self.position - begin + bool(self._decoder.getstate()[0]) == 2:
            begin += 1  # its first byte has shown that what was held back is no character
        self._add(data[1:])
        return begin

    def _add(self, data: bytes) -> None:
        self.position += len(self._decoder.decode(data))


class _Prompt:
    """Renders the answers to one prompt."""

    def __init__(self, request: CompletionRequest, chat: PreparedChat, place: int) -> None:
        self._request = request
        self._chat = chat
        self._first = place * chat.n
        self._hidden = frozenset[str]()
        tokenizer = chat.model.tokenizer
        if chat.skip_special_tokens:
            self._hidden = frozenset(tokenizer.added[token] for token in tokenizer.special_ids)
        self._echo = TextChoice("", 0)
        self._offsets: dict[int, _Offsets] = {}

    async def render(self, chunk: Chunk) -> TextChoice | None:
        """``chunk`` in another shape, if it holds something that is asked for."""
        (part,) = chunk.choices
        if isinstance(part.delta.role, str):
            return await self._begin(chunk, part)
        text = part.delta.content if isinstance(part.delta.content, str) else ""
        choice = TextChoice(text, self._first + part.index, finish_reason=part.finish_reason)
        choice.stop_reason, choice.token_ids = part.stop_reason, part.token_ids
        if part.logprobs is not None:
            choice.logprobs = self._logprobs(part.logprobs.content, self._offsets[part.index])
        if self._request.max_tokens == 0:  # one token was generated, because the engine must
            choice.text, choice.logprobs = "", None
            choice.finish_reason = choice.finish_reason and "length"
            choice.stop_reason = msgspec.UNSET
            choice.token_ids = choice.token_ids and []
        shows = choice.text or choice.finish_reason or choice.logprobs
        return choice if shows else None

    async def _begin(self, chunk: Chunk, part: ChunkChoice) -> TextChoice | None:
        """What stands before the answer. The first choice's chunk alone has what is known of the
        prompt, and it comes first."""
        if part.index == 0 and self._request.echo:
            self._echo = await asyncio.to_thread(self._repeat, chunk.prompt_logprobs or [None])
        self._offsets[part.index] = _Offsets(len(self._echo.text))
        choice = msgspec.structs.replace(self._echo, index=self._first + part.index)
        if self._chat.token_ids:
            choice.token_ids, choice.prompt_token_ids = [], self._chat.engine.prompt
        if part.index == 0 and self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = chunk.prompt_logprobs or [None]
            return choice
        return choice if self._request.echo or self._chat.token_ids else None

    def _repeat(self, entries: Sequence[Mapping[str, PromptLogprob] | None]) -> TextChoice:
        """The prompt as the beginning of an answer."""
        tokenizer, ids = self._chat.model.tokenizer, self._chat.engine.prompt
        # What stands before every prompt is no text.
        begins = len(tokenizer.bos) if tuple(ids[: len(tokenizer.bos)]) == tokenizer.bos else 0
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        pieces = [detokenizer.data((token,)) for token in ids[begins:]]
        text = b"".join(pieces).decode("utf-8", "replace")
        if self._request.logprobs is None:
            return TextChoice(text, 0)
        places = map(_Offsets().pass_by, [b""] * begins + pieces)
        found = TextLogprobs([], [], [], list(places))
        for token, entry in zip(ids, entries, strict=True):
            found.tokens.append(_name(*tokenizer.shown(token)))
            found.token_logprobs.append(None if entry is None else entry[str(token)].logprob)
            found.top_logprobs.append(self._top(entry, token))
        return TextChoice(text, 0, found)

    def _top(
        self, entry: Mapping[str, PromptLogprob] | None, token: int
    ) -> dict[str, float] | None:
        if entry is None:
            return None
        shown = self._chat.model.tokenizer.shown
        most = self._chat.engine.sampling.logprobs
        return {
            _name(*shown(int(other))): likely.logprob
            for other, likely in entry.items()
            if likely.rank <= most or int(other) == token
        }

    def _logprobs(self, content: Sequence[TokenLogprob], offsets: _Offsets) -> TextLogprobs:
        found = TextLogprobs([], [], [], [])
        for token in content:
            name = _name(token.token, token.bytes)
            found.tokens.append(name)
            found.token_logprobs.append(token.logprob)
            top = {
                _name(likely.token, likely.bytes): likely.logprob for likely in token.top_logprobs
            }
            found.top_logprobs.append(top | {name: token.logprob})
            data = b"" if token.token in self._hidden else bytes(msgspec.json.decode(token.bytes))
            found.text_offset.append(offsets.pass_by(data))
        return found


def _name(text: str, data: msgspec.Raw) -> str:
    """How OpenAI writes a token that is no text of its own."""
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in msgspec.json.decode(data))
