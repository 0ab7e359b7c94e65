"""What an answer has taken: tokens, and picture by picture tiles, tokens and time. The server knows
what a picture is and what preparing it took; what encoding it took comes with the outputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from preprocessing import Loaded, Spent
from server.chat.conversation import Conversation
from server.chat.prompt import Segment, Video
from server.chat.showing import Gallery
from server.chat.timings import Stopwatch
from server.schemas.common import (
    ImageUsage,
    MediaUsage,
    PromptTokensDetails,
    Usage,
    VideoUsage,
)
from wire.messages import EngineOutput, VisionItem


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture or video of a request: what was known of it before the engine was asked, which
    items of the engine's request show it, and what was spent on it."""

    facts: ImageUsage | VideoUsage
    items: range
    spent: Spent


def account(
    gallery: Gallery, conversation: Conversation, segments: Sequence[Segment], tokens_per_tile: int
) -> list[Shown]:
    """What is shown, in the order of the prompt."""
    shown: list[Shown] = []
    items = 0
    for segment in segments:
        if isinstance(segment, int):
            picture = gallery.pictures[segment]
            reduced = conversation.pictures[segment].param in gallery.reduced
            image = ImageUsage(
                **_common(segment, picture, picture.count, tokens_per_tile, reduced),
                width=picture.width,
                height=picture.height,
                grid=(picture.columns, picture.rows),
            )
            shown.append(Shown(image, range(items, items + 1), picture.spent))
            items += 1
        elif isinstance(segment, Video):
            video = gallery.videos[segment.index]
            first, facts = video.frames[0], video.facts
            tiles = sum(frame.count for frame in video.frames)
            reduced = conversation.videos[segment.index].param in gallery.reduced
            film = VideoUsage(
                **_common(segment.index, video, tiles, tokens_per_tile, reduced),
                width=first.width,
                height=first.height,
                frames=list(video.indices),
                seconds=[round(at, 3) for at in video.seconds],
            )
            if facts is not None:
                film.source_frames = facts.frames
                film.duration, film.fps = round(facts.duration, 3), round(facts.fps, 3)
            shown.append(Shown(film, range(items, items + len(video.frames)), video.spent))
            items += len(video.frames)
    return shown


def _common(
    index: int, loaded: Loaded, tiles: int, tokens_per_tile: int, reduced: bool
) -> dict[str, Any]:
    return {
        "index": index,
        "tiles": tiles,
        "tokens": tiles * tokens_per_tile,
        "reduced": reduced,
        "fetch_ms": milliseconds(loaded.spent.fetch),
        "preprocess_ms": milliseconds(loaded.spent.prepare),
    }


class Meter:
    """Adds up over the outputs of all choices. ``cached`` positions at the beginning of the prompt
    were not computed again, as far as is known, for the first choice, and ``shared`` for others.
    The ``stopwatch`` has the time of each choice."""

    def __init__(self, items: Sequence[VisionItem], shown: Sequence[Shown]) -> None:
        self._items = items
        self._shown = shown
        self._encode_seconds = [0.0] * len(items)
        self.stopwatch = Stopwatch()
        self.cached = 0
        self._found: dict[int, int] = {}

    @property
    def shared(self) -> int:
        """Of all choices but the first."""
        return sum(self._found.values())

    def encoded(self) -> list[float]:
        """Seconds of the encoder for each picture or video of which it encoded something."""
        spent = [self._encoding(shown) for shown in self._shown]
        return [seconds for seconds in spent if seconds]

    def add(self, index: int, output: EngineOutput) -> None:
        """Take in an output of a choice. The others find the prompt of the first in the cache."""
        if index == 0:
            self.cached = max(self.cached, output.cached_tokens)
        else:
            self._found[index] = output.cached_tokens
        self.stopwatch.add(index, output)
        for item, seconds in enumerate(output.encode_seconds or ()):
            self._encode_seconds[item] += seconds

    def usage(self, prompt: int, completion: int) -> Usage:
        """Of a prompt and an answer of so many tokens."""
        pictures = sum(item.length for item in self._items)
        details = PromptTokensDetails(self.cached, pictures)
        usage = Usage(prompt, completion, prompt + completion, details)
        if self._shown:
            used = [self._used(shown) for shown in self._shown]
            step = self._items[0].step  # all have the same
            usage.internvl = MediaUsage(
                [one for one in used if isinstance(one, ImageUsage)],
                [one for one in used if isinstance(one, VideoUsage)],
                step if step != 1 else None,
            )
        return usage

    def _used(self, shown: Shown) -> ImageUsage | VideoUsage:
        items = [self._items[index] for index in shown.items]
        return msgspec.structs.replace(
            shown.facts,
            cached_tokens=sum(min(max(self.cached - i.offset, 0), i.length) for i in items),
            encode_ms=milliseconds(self._encoding(shown)),
        )

    def _encoding(self, shown: Shown) -> float:
        return sum(self._encode_seconds[index] for index in shown.items)


def milliseconds(seconds: float) -> float:
    """As usage has them: to the microsecond."""
    return round(seconds * 1000, 3)
