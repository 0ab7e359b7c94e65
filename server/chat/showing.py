"""The pictures and videos of a request: from what its parts ask for to their tiles.

Most requests are loaded in one go. Where tiles or frames have to be given up, or a budget shared,
all parts are opened first: what their headers say settles how much each one gets.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar, cast

from preprocessing import Loaded, MediaPart, TiledMedia, TiledVideo
from preprocessing.budget import Share
from preprocessing.media import Facts, Kind, Opened
from preprocessing.pool import MediaStats
from preprocessing.turns import few_at_a_time
from server.chat import visual
from server.chat.conversation import Conversation
from server.chat.positions import Asked
from server.chat.prompt import Prompt, PromptBuilder, Segment, Video
from server.schemas.chat import VisualBudget
from wire.errors import ContextTooLong
from wire.geometry import VisionGeometry
from wire.messages import Ready

_S = TypeVar("_S")

# Tokens kept for the answer of a request that does not say how many it needs, where parts are made
# to fit; of a small context an eighth.
ANSWER_TOKENS = 256


class Room(Protocol):
    """Waits until tiles of so many bytes may be held, and holds them until the answer ends. Who
    has so many ``beside`` does not wait for more: so may who holds the others, for these."""

    async def __call__(self, size: int, /, *, beside: int = 0) -> Share:
        """Raises TooManyRequests when it takes too long, and InvalidRequest where there is never
        room for both."""


class Media(Protocol):
    """Fetches, decodes and tiles; ``preprocessing.MediaPipeline`` or a test's own."""

    @property
    def missing(self) -> Sequence[str]:
        """Layers of the decoders' sandbox that this system lacks."""

    @property
    def stats(self) -> MediaStats:
        """Counters of the decode workers."""

    async def start(self, geometry: VisionGeometry) -> None:
        """Make ready for a model."""

    async def load(self, part: MediaPart) -> Loaded:
        """Tiles of one part; raises MediaRefused."""

    @property
    def most_arriving(self) -> int:
        """Bytes of the largest upload that there can be room for."""

    def arriving(self) -> AbstractAsyncContextManager[Share]:
        """Room for the bytes of an upload, taken from as they come."""

    async def identify(self, encoded: bytes, param: str) -> tuple[Kind, Facts]:
        """What a file is by its header; raises MediaRefused."""

    def hold(self, parts: Sequence[MediaPart]) -> AbstractAsyncContextManager[Share | None]:
        """Room for the bytes of all these parts, while they are opened and tiled."""

    async def open(self, part: MediaPart, room: Share | None, *, look: bool = True) -> Opened:
        """Fetch one part and read its headers if asked to; raises MediaRefused."""

    async def tile(self, part: MediaPart, opened: Opened) -> Loaded:
        """Tiles of what was opened, within the bounds that ``part`` has now."""

    def forget(self) -> None:
        """Keep no tiles of earlier pictures."""

    async def close(self) -> None:
        """Free everything."""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """What a request shows, in order, and which of it got less than it asked for."""

    pictures: list[TiledMedia]
    videos: list[TiledVideo]
    reduced: frozenset[str] = frozenset()  # by their ``param``

    @property
    def size(self) -> int:
        """Bytes of all tiles."""
        return sum(p.size for p in self.pictures) + sum(v.size for v in self.videos)


@dataclasses.dataclass(frozen=True)
class _Unseen:
    """A picture of which only the place is known."""

    count: int = 0
    digest: bytes = b""


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What the parts of one request stand in: its prompt, and what it leaves them."""

    prompts: PromptBuilder
    segments: list[Segment]
    ready: Ready
    budget: VisualBudget | None
    answer_tokens: int | None
    delta: Asked = 1.0

    @property
    def context(self) -> int:
        """Tokens of prompt and answer. Where a picture's tokens take less than a position each, in
        the end its positions are counted too."""
        return self.ready.context() if self.delta == 1 else self.ready.max_model_len

    @property
    def reserve(self) -> int:
        """Tokens for an answer of which the request does not say how long it may be, or does."""
        if self.answer_tokens is None:
            return min(ANSWER_TOKENS, self.context // 8)
        return self.answer_tokens

    @property
    def order(self) -> list[int]:
        """Where the parts, all pictures and then all videos, are in the order of the prompt."""
        pictures = sum(isinstance(segment, int) for segment in self.segments)
        return [
            segment.index + pictures if isinstance(segment, Video) else segment
            for segment in self.segments
            if isinstance(segment, int | Video)
        ]

    def length(self, views: Sequence[visual.View]) -> int:
        """Tokens of the prompt, with each part as in ``views``."""
        frames = [len(view.shots) for view in views if view.part.kind == "video"]
        tiles = sum(view.tiles for view in views)
        text = self._text(len(views) - len(frames), frames)
        return text + tiles * self.ready.geometry.tokens_per_tile

    def prompt(self, views: Sequence[visual.View]) -> Prompt[_Unseen]:
        """The prompt, with each part as in ``views``."""
        shots = [[_Unseen(tiles) for tiles in view.shots] for view in views]
        pictures = sum(view.part.kind == "image" for view in views)
        shown = [picture for (picture,) in shots[:pictures]]
        return self.prompts.build(self.segments, shown, shots[pictures:])

    def _text(self, pictures: int, frames: Sequence[int]) -> int:
        """Tokens of the prompt that stand for no tile, with so many frames of each video."""
        shots = [[_Unseen()] * count for count in frames]
        return len(self.prompts.build(self.segments, [_Unseen()] * pictures, shots).ids)

    def limits(self, parts: Sequence[MediaPart]) -> visual.Limits:
        """What there is for the parts."""
        most = max((part.choice.most for part in parts if part.choice is not None), default=1)
        frame = self.prompts.frame_tokens(most)
        videos = sum(part.kind == "video" for part in parts)
        # With a frame each, and less what it is counted for: what stands before a video and what
        # stands behind it may be fewer tokens with nothing between them.
        text = self._text(len(parts) - videos, [1] * videos) - videos * frame
        context = self.context
        return visual.Limits(
            self.ready.geometry,
            context,
            context - text - self.reserve,
            context - text - (self.answer_tokens or 1),
            frame,
            self.budget,
        )

    def fits_anyway(self, parts: Sequence[MediaPart]) -> bool:
        """Whether nothing can have to be given up or refused, whatever the parts are; pictures that
        do not give are told apart later."""
        if self.budget is not None:
            return False
        # Pictures come one by one, and are refused when they are too many. A video comes whole.
        if not any(part.fit or part.kind == "video" for part in parts):
            return True
        most = sum(visual.most_tiles(part, self.ready.geometry) for part in parts)
        shots = sum(part.choice.most for part in parts if part.choice is not None)
        # No token is shorter than a byte.
        text = sum(len(s.encode()) for s in self.segments if isinstance(s, str))
        text += 2 * len(self.segments) + shots * self.prompts.frame_tokens(shots)
        answer = self.answer_tokens or ANSWER_TOKENS
        return most * self.ready.geometry.tokens_per_tile + text + answer <= self.context


async def show(
    media: Media, conversation: Conversation, canvas: Canvas, at_once: int, room: Room
) -> Gallery:
    """Load all parts, in what ``room`` gives for their tiles. Raises MediaRefused, InvalidRequest
    for a budget that is too small, ContextTooLong, TooManyRequests and Unavailable."""
    parts = conversation.parts
    if not parts:
        return Gallery([], [])
    settled = canvas.fits_anyway(parts)
    reduced: frozenset[str] = frozenset()
    # Slow servers would keep the room from others: it is asked for when all is here. Where all is
    # here from the beginning it comes first, so that nobody who has it waits for who wants it.
    share: Share | None = None
    if not any(part.is_remote for part in parts):
        share = await room(_most_bytes(parts, canvas.ready))
    if settled and share is not None:
        loaded = await load_all(media.load, parts, canvas.ready, at_once)
    else:
        async with media.hold(parts) as held:
            opened = await open_all(media, parts, held, at_once, look=not settled)
            shown = parts
            if not settled:
                facts = [one.facts for one in opened]
                views = await asyncio.to_thread(_settle, canvas, parts, facts)
                shown = [view.held for view in views]
                reduced = frozenset(
                    view.part.param
                    for view, part in zip(views, parts, strict=True)
                    if view.part != part
                )
            if share is None:
                share = await room(_most_bytes(shown, canvas.ready))
            pairs = list(zip(shown, opened, strict=True))
            loaded = await load_all(lambda pair: media.tile(*pair), pairs, canvas.ready, at_once)
    pictures = cast(list[TiledMedia], loaded[: len(conversation.pictures)])
    videos = cast(list[TiledVideo], loaded[len(conversation.pictures) :])
    gallery = Gallery(pictures, videos, reduced)
    share.keep(gallery.size)
    return gallery


def _most_bytes(parts: Sequence[MediaPart], ready: Ready) -> int:
    """What the tiles of all parts may take: all that each may have, or all that the context has."""
    geometry = ready.geometry
    context = ready.max_model_len // geometry.tokens_per_tile
    most = sum(visual.most_tiles(part, geometry) for part in parts)
    return min(context, most) * geometry.tile_bytes


def _settle(
    canvas: Canvas, parts: Sequence[MediaPart], facts: Sequence[Sequence[Facts]]
) -> list[visual.View]:
    return visual.Fitter(parts, facts, canvas.limits(parts)).fitted()


async def open_all(
    media: Media, parts: Sequence[MediaPart], held: Share | None, at_once: int, *, look: bool = True
) -> list[Opened]:
    """All parts, in order; the first failure ends the rest."""
    return await few_at_a_time(lambda part: media.open(part, held, look=look), parts, at_once)


async def load_all(
    load: Callable[[_S], Awaitable[Loaded]], parts: Sequence[_S], ready: Ready, at_once: int
) -> list[Loaded]:
    """All parts, in order; the first failure ends the rest. Raises ContextTooLong as soon as they
    alone do not fit."""
    tiles = len(parts)  # each has one at least

    async def checked(part: _S) -> Loaded:
        nonlocal tiles
        check()
        loaded = await load(part)
        tiles += _tiles(loaded) - 1
        check()
        return loaded

    def check() -> None:
        if tiles * ready.geometry.tokens_per_tile >= ready.max_model_len:
            raise ContextTooLong(
                ready.max_model_len,
                f"the prompt is too long: its pictures and videos have "
                f"{tiles * ready.geometry.tokens_per_tile} tokens or more. With 'fit' in each "
                "part, or a visual_budget, they are shown smaller.",
                param="messages",
            )

    return await few_at_a_time(checked, parts, at_once)


def _tiles(loaded: Loaded) -> int:
    if isinstance(loaded, TiledVideo):
        return sum(frame.count for frame in loaded.frames)
    return loaded.count
