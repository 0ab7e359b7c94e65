"""Prompt lookup: tokens that may come next, because they came next before.

What a model writes often repeats what it has read or written: a table its tags, an answer the
question's words. A step of a few tokens takes hardly longer than a step of one, as both read all
weights: so tokens are computed on trial, and as many are kept as are what is drawn in their place.
Every token is drawn as if it had been alone, so that the text is the same.

The way is prompt lookup decoding (A. Saxena, 2023); that a longer match is trusted for more tokens
is from SuffixDecoding (Oliaro et al., arXiv 2411.04975).
"""

import sys
from collections.abc import Collection, Iterator

import msgspec
import numpy as np

from engine.plan import Sampled, Work
from wire.messages import EngineOutput, pack
from wire.settings import EngineSettings

_BORDER = chr(0x10FFFF)  # is no token: vocabularies have a sixth as many
# In its own order of bytes: with a name that leaves it open, the first token might say which it is.
_CODEC = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
# By how many tokens two places are compared.
_LONGEST = 8
# On a CPU with the 1B shape six tokens take 4 to 27 % longer than one, and seven draws no longer
# share a sketch of the head (model/native/draw.c).
_ON_CPU = 5


def max_speculated(settings: EngineSettings, device: str) -> int:
    """Tokens that one step may compute on trial, of all sequences; 0: nothing is known of the
    step before when the next is planned, or nobody asked for it."""
    if settings.async_scheduling == "on":
        return 0
    if settings.speculative_tokens < 0:
        return _ON_CPU if device.startswith("cpu") else 0
    return settings.speculative_tokens


def max_draws(settings: EngineSettings, device: str) -> int:
    """Tokens that one step may draw: those on trial come beside one of each sequence, as others may
    be admitted in a step in which few have some on trial."""
    return settings.max_num_seqs + max_speculated(settings, device)


class PromptLookup:
    """All tokens of one sequence, to look for the last ones among those before, and among those of
    a ``prediction``. They are the characters of a text, as nothing searches faster than that."""

    __slots__ = ("_predicted", "_seen")

    def __init__(self, prediction: bytes) -> None:
        self._seen = _text(prediction) + _BORDER if prediction else ""
        self._predicted = len(self._seen)

    def find(self, tokens: list[int], most: int) -> list[int]:
        """What came behind the place that is like the end of ``tokens`` for longest, and the last
        of several: one token more than are alike, ``most`` at most. What is not known yet is taken
        to go on in circles. ``tokens`` are those of the last call, and more."""
        self._seen += _text(pack(tokens[len(self._seen) - self._predicted :]))
        seen, alike = self._seen, 0
        place = end = len(seen) - 1
        while alike < _LONGEST:
            found = seen.rfind(seen[end - alike :], 0, place)
            if found < 0:
                break
            alike += 1
            place = found + alike
        if not alike:
            return []
        count = min(alike + 1, most)
        behind = seen[place : place + count] * count
        return list(map(ord, behind[:count].partition(_BORDER)[0]))


def are_known(tokens: bytes, vocab_size: int) -> bool:
    """Whether packed tokens are whole, and ids that the model knows."""
    if not tokens:
        return True
    if len(tokens) % 4:
        return False
    ids = np.frombuffer(tokens, dtype=np.int32)
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _text(tokens: bytes) -> str:
    """A character for each of the packed tokens."""
    return tokens.decode(_CODEC, "surrogatepass")


def follow(work: Work, drawn: Sampled, sampled: Iterator[Sampled]) -> tuple[list[Sampled], Sampled]:
    """The draws of tokens on trial that were right, of which ``drawn`` may be the first and the
    rest is ``sampled``, and the draw behind them."""
    right = []
    for token in work.speculated:
        if drawn.error is not None or drawn.stuck or drawn.token_id != token:
            break
        right.append(drawn)
        drawn = next(sampled)
    return right, drawn


def behind(right: Collection[Sampled], output: EngineOutput) -> list[EngineOutput]:
    """What ``output`` tells, behind the tokens that were right. An error comes by itself."""
    ids = [each.token_id for each in right] + output.token_ids
    logprobs = [each.logprobs for each in right if each.logprobs is not None]
    logprobs += output.logprobs or []
    told = msgspec.structs.replace(output, token_ids=ids, logprobs=logprobs or None)
    if output.token_ids:
        return [told]
    return [msgspec.structs.replace(told, finish_reason=None, error=None), output]
