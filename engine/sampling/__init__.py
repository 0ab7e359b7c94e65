"""From logits to a token: the steps that change logits, in the order they are applied."""

import numpy as np

from engine.grammar import Matcher
from engine.sampling.base import SampleRow, Step
from engine.sampling.filters import MinP, Temperature, TopK, TopP
from engine.sampling.grammar import GrammarMask
from engine.sampling.shaping import (
    AllowedTokens,
    BadWords,
    LogitBias,
    MinTokens,
    OutputPenalties,
    RepetitionPenalty,
)
from wire.sampling import SamplingParams

SHAPING: tuple[Step, ...] = (
    AllowedTokens(),
    BadWords(),
    MinTokens(),
    LogitBias(),
    RepetitionPenalty(),
    OutputPenalties(),
    GrammarMask(),  # the last one: what it removes must not come back
)
"""Every row that needs them."""
FILTERS: tuple[Step, ...] = (Temperature(), TopK(), TopP(), MinP())
"""Rows that are drawn: the likeliest token stays the likeliest, so greedy rows skip them."""


def is_plain(params: SamplingParams, matcher: Matcher | None) -> bool:
    """Whether at every position nothing but the temperature stands between logits and token, and
    nothing is asked of the logits beside the token."""
    if params.logprobs >= 0:
        return False
    steps = SHAPING if params.greedy else SHAPING + FILTERS[1:]
    # What is needed at all is needed at the first position or behind it.
    rows = [SampleRow(params, _NO_TOKENS[:0], _NO_TOKENS[:count], matcher) for count in (0, 1)]
    return not any(step.needed(row) for step in steps for row in rows)


_NO_TOKENS = np.zeros(1, dtype=np.int64)
