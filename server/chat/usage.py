"""What an answer has taken: tokens, and picture by picture tiles, tokens and time. The server knows
what a picture is and what preparing it took; what encoding it took comes with the outputs."""

import dataclasses
from collections.abc import Sequence

import msgspec

from server.schemas.common import ImageUsage, MediaUsage, PromptTokensDetails, Usage
from wire.messages import EngineOutput, VisionItem


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture of a request: what was known of it before the engine was asked, and which items
    of the engine's request show it."""

    facts: ImageUsage
    items: range


class Meter:
    """Adds up over the outputs of all choices."""

    def __init__(self, items: Sequence[VisionItem], shown: Sequence[Shown]) -> None:
        self._items = items
        self._shown = shown
        self._encode_seconds = [0.0] * len(items)

    @property
    def encode_seconds(self) -> float:
        """Of the engine, for all pictures."""
        return sum(self._encode_seconds)

    def add(self, output: EngineOutput) -> None:
        """Take in an output of any choice."""
        for index, seconds in enumerate(output.encode_seconds or ()):
            self._encode_seconds[index] += seconds

    def usage(self, prompt: int, completion: int, cached: int) -> Usage:
        """``cached`` positions at the beginning of the prompt were not computed again."""
        pictures = sum(item.length for item in self._items)
        details = PromptTokensDetails(cached, pictures)
        usage = Usage(prompt, completion, prompt + completion, details)
        if self._shown:
            usage.internvl = MediaUsage([self._used(shown, cached) for shown in self._shown])
        return usage

    def _used(self, shown: Shown, cached: int) -> ImageUsage:
        items = [self._items[index] for index in shown.items]
        return msgspec.structs.replace(
            shown.facts,
            cached_tokens=sum(min(max(cached - i.offset, 0), i.length) for i in items),
            encode_ms=milliseconds(sum(self._encode_seconds[index] for index in shown.items)),
        )


def milliseconds(seconds: float) -> float:
    """As usage has them: to the microsecond."""
    return round(seconds * 1000, 3)
