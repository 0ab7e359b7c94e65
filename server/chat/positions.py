"""How many positions each token of a picture takes (V2PE, ``wire.positions``): what a request or
the server asks for, and which step that is for a prompt."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from wire.messages import Ready, VisionItem
from wire.positions import STEPS, all_saved

Asked = float | Literal["auto"]


def read_delta(setting: str) -> Asked:
    """The setting's "auto", "1" or "1/4" as requests have it."""
    if setting == "auto":
        return "auto"
    return 1 / float(setting.removeprefix("1/"))


def place(items: Sequence[VisionItem], asked: Asked, length: int, ready: Ready) -> list[VisionItem]:
    """The pictures of a sequence of ``length`` tokens with their step: the one asked for, or the
    largest with which the sequence ends inside the positions that the model was trained with; the
    smallest if none does. No sequence is longer than the context, whatever was asked for."""
    length = min(length, ready.max_model_len)
    for step in STEPS if asked == "auto" else (asked,):
        placed = [msgspec.structs.replace(item, step=step) for item in items]
        if length <= ready.max_positions + all_saved(placed):
            break
    return placed
