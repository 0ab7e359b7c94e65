"""What a step of the sampler is, and what it knows of a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from engine.grammar import Matcher
from model.transfer import to_device
from wire.sampling import SamplingParams

NOT_FINITE, NOTHING_LEFT = -1, -2
"""What stands in place of a token: the logits are not numbers, or all of them were removed."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits: how to draw from it, and the tokens before it.

    ``prompt`` and ``output`` are int64 arrays, views of the runner's tables. ``matcher`` is there
    if the params have a grammar.
    """

    params: SamplingParams
    prompt: np.ndarray
    output: np.ndarray
    matcher: Matcher | None = None

    @property
    def position(self) -> int:
        """Output position of the token to draw; the first generated token's is 0."""
        return len(self.output)


class Step(Protocol):
    """One step of the sampler. It is called with the rows that need it, and only with them."""

    def needed(self, row: SampleRow) -> bool:
        """Whether the row is changed at all."""

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """fp32 logits ``[R, V]`` to new ones; removed tokens are at -inf. Changes no input."""


def column(
    like: Tensor, rows: Sequence[SampleRow], value: Callable[[SamplingParams], float]
) -> Tensor:
    """One value per row, ``[R, 1]``, in the type and on the device of ``like``."""
    values = [value(row.params) for row in rows]
    return to_device(values, like.device, like.dtype)[:, None]


def entries(logits: Tensor, ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Index of the given tokens of each row: (row numbers, token ids), flat, one copy each."""
    counts = [len(tokens) for tokens in ids]
    rows = np.repeat(np.arange(len(ids)), counts)
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int64)
    both = to_device(np.stack([rows, tokens.astype(np.int64)]), logits.device)
    return both[0], both[1]
