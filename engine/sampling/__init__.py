"""From logits to a token: the steps that change logits, in the order they are applied."""

from engine.sampling.base import Step
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
