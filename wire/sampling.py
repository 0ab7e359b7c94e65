"""Sampling parameters, with the checks that need no model."""

from collections.abc import Iterator

import msgspec

from wire.errors import InvalidRequest

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True):
    """How to choose the next token of one sequence.

    ``temperature`` 0 means greedy, whatever the filters say. ``top_k`` 0 means all tokens.
    ``seed`` makes draws repeatable: the draw at position i of a sequence depends on (seed, i)
    and the logits alone, never on the batch. ``stop_token_ids`` end the sequence with reason
    "stop"; they are not part of the visible text, and are not drawn before ``min_tokens``.

    The penalties are neutral at 1.0 (repetition) and 0.0. ``logit_bias`` holds (token id, number
    to add), ``bad_words`` token sequences that are never completed; without
    ``allowed_token_ids`` all are allowed. ``logprobs`` is how many of the likeliest tokens to
    report beside the drawn one; -1 reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int = -1

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1

    def named_tokens(self) -> Iterator[int]:
        """Every token id that a parameter names; the model must know them."""
        yield from self.stop_token_ids
        yield from self.allowed_token_ids
        for token, _ in self.logit_bias:
            yield token
        for word in self.bad_words:
            yield from word

    def check(self) -> None:
        """Raise InvalidRequest for a value outside its range."""
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _within("max_completion_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("logprobs", self.logprobs, -1, MAX_LOGPROBS)
        for token, bias in self.logit_bias:
            _within(f"logit_bias.{token}", bias, -100.0, 100.0)
        if not all(self.bad_words):
            raise InvalidRequest("bad_words must not hold an empty word", param="bad_words")


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # Written so that NaN, for which every comparison is false, is refused too.
    if not ((low < value if low_open else low <= value) and value <= high):
        opening = "(" if low_open else "["
        raise InvalidRequest(f"{name} must be in {opening}{low}, {high}], got {value}", param=name)
