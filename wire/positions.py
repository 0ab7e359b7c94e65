"""Positions of tokens where those that stand for pixels take less than one each: V2PE, variable
visual position encoding (arXiv 2412.09616; the model was trained with all of these steps).

The token before a picture has a whole position p. The picture's tokens, those of all its tiles
together, have p + step, p + 2 step and so on; the token behind it has one more than the last of
them, rounded up. With a step of 1 that is what everybody does.
"""

import math
from collections.abc import Iterable

from wire.messages import VisionItem

STEPS = tuple(2.0**-power for power in range(9))
"""1 to 1/256, the largest first. Positions up to 65,536 are exact in fp32 with each of them."""


def saved(length: int, step: float) -> int:
    """By how many positions a picture of ``length`` tokens is shorter than with a step of 1."""
    return length - math.ceil(length * step)


def all_saved(items: Iterable[VisionItem]) -> int:
    """The same for all pictures of a prompt."""
    return sum(saved(item.length, item.step) for item in items)
