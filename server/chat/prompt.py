"""The prompt of a conversation, as token ids. It is put together from segments: special tokens by
id, and between them runs of text in which no token name has a meaning. So nothing a client types
can open a turn, close a picture or stand for one. Each run is as long as possible, which makes
the ids equal to those of the whole rendered text wherever a client typed no token name.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from server.chat import tools
from server.tokenizer import Tokenizer
from wire.errors import ContextTooLong, InvalidRequest
from wire.geometry import PromptFormat
from wire.messages import VisionItem, pack
from wire.tokenizer_file import TokenizerError

# Characters of a predicted text that are read, for each token that a sequence may have.
_LONG_TOKEN = 16

# Names a client may use for the tokens they stand for: grounding marks, and the tags of tool
# calls, which the tokenizer does not count among its special tokens.
ALLOWED = (
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *(tools.CALL, tools.CALL_END),
)

TURN, TURN_END = "<|im_start|>", "<|im_end|>"
PICTURE, PICTURE_END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


class TiledPicture(Protocol):
    """What the prompt must know of a picture."""

    @property
    def digest(self) -> bytes:
        """Identity of the pixels."""

    @property
    def count(self) -> int:
        """Number of tiles, the thumbnail included."""


P = TypeVar("P", bound=TiledPicture)


@dataclasses.dataclass(frozen=True)
class Video:
    """A video, by its index among the videos of a conversation."""

    index: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message. ``content`` holds texts, pictures by their index among the pictures of the
    conversation, and videos."""

    role: str
    content: tuple[str | int | Video, ...]
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Prompt(Generic[P]):
    """``items`` stand in the order of their offsets, and so does what they show; ``buffers`` has,
    for each raw buffer to send, the picture it comes from (equal pictures share one)."""

    ids: list[int]
    items: list[VisionItem]
    buffers: list[P]


@dataclasses.dataclass(frozen=True)
class _Special:
    token: str


Segment = str | int | Video | _Special

Ending = Literal["ask", "close", "continue"]
"""How a prompt ends: with the beginning of an assistant turn, behind the last turn, or in it."""


class PromptBuilder:
    """Renders conversations for one checkpoint. ``number_images`` and ``system`` are settled:
    the checkpoint's habit, unless the operator chose otherwise."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptFormat,
        tokens_per_tile: int,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._tokens_per_tile = tokens_per_tile
        self._max_model_len = max_model_len
        self._ids = {
            token: self._required(token)
            for token in (TURN, TURN_END, PICTURE, PICTURE_END, CONTEXT)
        }
        self._encode_turn = tokenizer.naming(ALLOWED)
        self._encode_special = tokenizer.naming(set(tokenizer.added.values()) - {CONTEXT})

    def _required(self, token: str) -> int:
        found = self._tokenizer.token_id(token)
        if found is None:
            raise TokenizerError(f"the tokenizer has no {token} token")
        return found

    def names(self, pictures: int) -> bool:
        """Whether so many pictures are named, each "Image-k" from 1 on."""
        return self._template.number_images and pictures > 1

    def last_turn(self, ids: Sequence[int]) -> Sequence[int]:
        """What follows the last beginning of a turn in a prompt."""
        return ids[len(ids) - ids[::-1].index(self._ids[TURN]) :]

    def openings(self, ids: Sequence[int]) -> list[int]:
        """Positions of the last token of each beginning of an assistant turn in a prompt."""
        head = [self._ids[TURN], *self._encode_turn("assistant\n")]
        size = len(head)
        return [
            at + size - 1
            for at, token in enumerate(ids)
            if token == head[0] and list(ids[at : at + size]) == head
        ]

    def first_token(self, answer: str) -> int:
        """The one token that ``answer`` is at the beginning of an assistant turn. Raises
        TokenizerError if it is not one."""
        head = self._encode_turn("assistant\n")
        *before, token = self._encode_turn("assistant\n" + answer)
        if before != head:
            raise TokenizerError(f"the tokenizer has no one token for {answer!r}")
        return token

    def frame_tokens(self, frames: int) -> int:
        """Tokens that a frame of so many takes besides its tiles: its label and the two marks."""
        return len(self._tokenizer.encode(f"\nFrame{frames}: ")) + 2

    def render(
        self,
        turns: Sequence[Turn],
        pictures: int,
        offered: Sequence[dict[str, Any]] = (),
        ending: Ending = "ask",
    ) -> list[Segment]:
        """The text that asks for the next assistant turn; ``offered`` are tools.

        Raises ContextTooLong, without tokenising it, for a text that cannot fit.
        """
        segments = list(self._segments(turns, pictures, offered, ending))
        text = "".join(segment for segment in segments if isinstance(segment, str))
        self._check_length(text, "messages")
        return segments

    def read(self, text: str, param: str, *, special: bool, bos: bool) -> list[int]:
        """Ids of a text that is a whole prompt. Where ``special`` tokens may be named, all but the
        one that stands for pixels are. Raises ContextTooLong as ``render`` does."""
        self._check_length(text, param)
        return self.encode(text, special=special, bos=bos)

    def encode(self, text: str, *, special: bool, bos: bool) -> list[int]:
        """The same for a text of any length."""
        encode = self._encode_special if special else self._tokenizer.encode
        return [*(self._tokenizer.bos if bos else ()), *encode(text)]

    def predict(self, text: str) -> bytes:
        """Packed ids of a text that may come as an answer, no more than a sequence may have. A name
        in it is what it is in a user's text."""
        most = self._max_model_len
        return pack(self._encode_turn(text[: most * _LONG_TOKEN])[:most])

    def check_ids(self, ids: Sequence[int], param: str, vocab_size: int) -> None:
        """Raise InvalidRequest where these cannot be a prompt."""
        pixels = self._ids[CONTEXT]
        if max(ids) < vocab_size and pixels not in ids:
            return
        for number, token in enumerate(ids):
            where = f"{param}[{number}]"
            if token == pixels:
                raise InvalidRequest(
                    f"{where} stands for a part of a picture; pictures are shown in a chat only.",
                    param=where,
                )
            if token >= vocab_size:
                raise InvalidRequest(
                    f"{where}: token ids must be less than {vocab_size}.", param=where
                )

    def _check_length(self, text: str, param: str) -> None:
        most = self._max_model_len
        # No token is shorter than a byte, so that few prompts need the second question.
        if len(text) > most and self._tokenizer.least(text, most + 1) > most:
            raise ContextTooLong(
                most, "the prompt is too long: it has more than that.", param=param
            )

    def build(
        self,
        segments: Sequence[Segment],
        pictures: Sequence[P],
        videos: Sequence[Sequence[P]] = (),
    ) -> Prompt[P]:
        """The ids of what ``render`` gave, for these pictures and the frames of these videos."""
        ids = list(self._tokenizer.bos)
        items: list[VisionItem] = []
        buffers: dict[bytes, int] = {}
        sources: list[P] = []
        run: list[str] = []
        for segment in _shown(segments, pictures, videos):
            if isinstance(segment, str):
                run.append(segment)
                continue
            ids += self._encode_turn("".join(run))
            run.clear()
            if isinstance(segment, _Special):
                ids.append(self._ids[segment.token])
                continue
            if segment.digest not in buffers:
                buffers[segment.digest] = len(sources)
                sources.append(segment)
            length = segment.count * self._tokens_per_tile
            items.append(
                VisionItem(
                    digest=segment.digest,
                    offset=len(ids),
                    length=length,
                    tiles=segment.count,
                    buffer=buffers[segment.digest],
                )
            )
            ids += [self._ids[CONTEXT]] * length
        ids += self._encode_turn("".join(run))
        return Prompt(ids, items, sources)

    def _segments(
        self,
        turns: Sequence[Turn],
        pictures: int,
        offered: Sequence[dict[str, Any]],
        ending: Ending,
    ) -> Iterator[Segment]:
        numbered = self.names(pictures)
        turns = self._with_system(turns, offered)
        for index, turn in enumerate(turns):
            follows_result = index > 0 and turns[index - 1].role == "tool"
            if turn.role == "tool":
                # Results in a row share one user turn.
                if not follows_result:
                    yield from (_Special(TURN), "user")
                before, after = tools.RESULT
                yield "\n" + before
                yield from self._parts(turn, numbered)
                yield after
                if index + 1 < len(turns) and turns[index + 1].role == "tool":
                    continue
            else:
                yield from (_Special(TURN), turn.role)
                yield from self._content(turn, numbered)
            if ending == "continue" and index + 1 == len(turns):
                return
            yield from (_Special(TURN_END), self._template.after_turn)
        if ending == "ask":
            yield from (_Special(TURN), "assistant\n")

    def _content(self, turn: Turn, numbered: bool) -> Iterator[Segment]:
        # In an assistant turn made of calls alone, the first call follows the role directly.
        if turn.content or not turn.calls:
            yield "\n"
        yield from self._parts(turn, numbered)
        for name, arguments in turn.calls:
            yield "\n" + tools.render_call(name, arguments)

    def _parts(self, turn: Turn, numbered: bool) -> Iterator[Segment]:
        for part in turn.content:
            if isinstance(part, str | Video):
                yield part
            else:
                if numbered:
                    yield f"Image-{part + 1}: "
                yield from (_Special(PICTURE), part, _Special(PICTURE_END), "\n")

    def _with_system(
        self, turns: Sequence[Turn], offered: Sequence[dict[str, Any]]
    ) -> Sequence[Turn]:
        """The conversation with its system turn, which also offers the tools."""
        first: tuple[str | int | Video, ...] | None = None
        if turns and turns[0].role == "system":
            first, turns = turns[0].content, turns[1:]
        elif self._template.system is not None:
            first = (self._template.system,)
        if offered:
            first = (*(first or ()), tools.describe(offered))
        return turns if first is None else [Turn("system", first), *turns]


def _shown(
    segments: Sequence[Segment], pictures: Sequence[P], videos: Sequence[Sequence[P]]
) -> Iterator[str | _Special | P]:
    """The segments with what they show. Frames are labelled as the reference labels them, in both
    formats."""
    for segment in segments:
        if isinstance(segment, int):
            yield pictures[segment]
        elif isinstance(segment, Video):
            for number, frame in enumerate(videos[segment.index], 1):
                yield f"Frame{number}: "
                yield from (_Special(PICTURE), frame, _Special(PICTURE_END), "\n")
        else:
            yield segment
