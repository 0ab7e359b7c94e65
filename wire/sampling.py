"""Sampling parameters, with the checks that need no model."""

from collections.abc import Iterator
from typing import Literal

import msgspec

from wire.errors import InvalidRequest

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_GRAMMAR_LENGTH = 1 << 16
MAX_GRAMMAR_LINES = 512
MAX_CHOICES = 1024
MAX_NESTING = 64


class Grammar(msgspec.Struct, frozen=True):
    """What the text of an answer must be.

    ``text`` is, by ``kind``: nothing (any JSON object), a JSON schema, a regular expression, a JSON
    array of strings, or a grammar in llguidance's dialect of Lark. ``strict`` is about a schema:
    whether all of it must be enforced, or only what can be.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    text: str = ""
    strict: bool = True

    def problem(self) -> str | None:
        """What is wrong with its form or size, to be read behind the name of a field."""
        if len(self.text) > MAX_GRAMMAR_LENGTH:
            return f"must not be longer than {MAX_GRAMMAR_LENGTH} characters"
        if self.kind == "lark" and self.text.count("\n") >= MAX_GRAMMAR_LINES:
            return f"must not have more than {MAX_GRAMMAR_LINES} lines"
        if self.kind not in ("json_schema", "choice"):
            return None
        try:
            value = msgspec.json.decode(self.text)
        except (msgspec.DecodeError, RecursionError):
            return "must be JSON"
        if self.kind == "json_schema":
            if not isinstance(value, dict):
                return "must be an object"
            deep = _nesting(value) > MAX_NESTING
            return f"must not be nested deeper than {MAX_NESTING} levels" if deep else None
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            return "must be an array of strings"
        return None if 0 < len(value) <= MAX_CHOICES else f"must have 1 to {MAX_CHOICES} entries"


def _nesting(value: object) -> int:
    """How many arrays and objects stand in each other, level by level."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [
            part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


class Lookup(msgspec.Struct, frozen=True):
    """The log-probabilities of the tokens ``ids`` behind the positions ``at`` of a prompt, which
    ascend and end before its last one."""

    at: tuple[int, ...]
    ids: tuple[int, ...]


class SamplingParams(msgspec.Struct, frozen=True):
    """How to choose the next token of one sequence.

    ``temperature`` 0 means greedy, whatever the filters say. ``top_k`` 0 means all tokens.
    ``seed`` makes draws repeatable: the draw at position i of a sequence depends on (seed, i)
    and the logits alone, never on the batch. ``stop_token_ids`` end the sequence with reason
    "stop"; they are not part of the visible text, and are not drawn before ``min_tokens``.

    The penalties are neutral at 1.0 (repetition) and 0.0. ``logit_bias`` holds (token id, number
    to add), ``bad_words`` token sequences that are never completed; without
    ``allowed_token_ids`` all are allowed. ``logprobs`` is how many of the likeliest tokens to
    report beside the drawn one; -1 reports nothing. ``prompt_logprobs`` is the same for each token
    of the prompt but the first; a ``lookup`` is in its place where few positions of the prompt, and
    tokens that are known, are asked about.

    With a ``grammar`` the text is a sentence of it, or the beginning of one where ``max_tokens``
    cuts it off: no other token is drawn, and stop tokens only where a sentence may end. A stop
    token that the grammar also allows as text ends the sequence there too.
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
    prompt_logprobs: int = -1
    lookup: Lookup | None = None
    grammar: Grammar | None = None

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
        if self.lookup is not None:
            yield from self.lookup.ids

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
        _within("prompt_logprobs", self.prompt_logprobs, -1, MAX_LOGPROBS)
        for token, bias in self.logit_bias:
            _within(f"logit_bias.{token}", bias, -100.0, 100.0)
        if not all(self.bad_words):
            raise InvalidRequest("bad_words must not hold an empty word", param="bad_words")
        if self.grammar is not None:
            problem = self.grammar.problem()
            if problem is not None:
                raise InvalidRequest(f"grammar {problem}", param="grammar")
            if not self.stop_token_ids:
                raise InvalidRequest("a grammar needs a stop token to end with", param="grammar")


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # Written so that NaN, for which every comparison is false, is refused too.
    if not ((low < value if low_open else low <= value) and value <= high):
        opening = "(" if low_open else "["
        raise InvalidRequest(f"{name} must be in {opening}{low}, {high}], got {value}", param=name)
