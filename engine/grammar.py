"""Which tokens a grammar allows next, for the sequences that have one.

Torch-free: masks are written into arrays. What a grammar means, and what bounds it, is in
``wire.grammar``.
"""

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from wire.grammar import compile_grammar, complaint
from wire.sampling import Grammar, SamplingParams
from wire.tokenizer_file import TokenizerError, read_tokenizer_json

logger = logging.getLogger(__name__)

# Compiled grammars; a large one takes 3 MB. Where more than so many different ones wait at once, a
# step compiles again the one that it does not find.
_KEPT = 64
# Masks that are worth waking other threads: one takes about ten microseconds.
_ENOUGH = 8


class Matcher:
    """Where one sequence stands in its grammar. ``error`` says why it cannot go on, if so."""

    def __init__(self, inner: LLMatcher, tokenizer: LLTokenizer, stops: Sequence[int]) -> None:
        self.inner = inner
        self._ends = tokenizer.eos_tokens
        self._stops = stops
        self._taken = 0
        self.error = complaint(inner)
        self.words = -(-tokenizer.vocab_size // 32)
        """Length of a mask in words of 32 bits."""

    def advance(self, output: np.ndarray) -> None:
        """Take in the generated tokens; ``output`` holds all of them, int64."""
        self.inner.consume_tokens(output[self._taken :].tolist())
        self._taken = len(output)
        self.error = complaint(self.inner)

    def settle(self, mask: np.ndarray) -> None:
        """Finish a mask that the library has written: the request's stop tokens in the place of its
        own, or nothing if there is an error, which may only have come up with the mask."""
        self.error = complaint(self.inner)
        if self.error:
            mask[:] = 0
            return
        for token in self._ends:
            mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        if self.inner.is_accepting():
            for token in self._stops:
                if token >> 5 < len(mask):
                    mask[token >> 5] |= np.uint32(1 << (token & 31))


def masks(matchers: Sequence[Matcher]) -> np.ndarray:
    """What each matcher allows next: uint32 ``[R, words]``, bit ``i & 31`` of word ``i >> 5`` for
    token i. Stop tokens are allowed where a sentence may end, and nothing where there is an error.
    """
    found = np.zeros((len(matchers), matchers[0].words), dtype=np.uint32)
    going = [(matcher.inner, i) for i, matcher in enumerate(matchers) if not matcher.error]
    if len(going) >= _ENOUGH:
        size = found.strides[0]
        _threads().unsafe_compute_mask_ptr(going, found.ctypes.data, size, len(found))
    else:
        for inner, i in going:
            inner.unsafe_compute_mask_ptr(found[i].ctypes.data, found[i].nbytes)
    for matcher, mask in zip(matchers, found, strict=True):
        matcher.settle(mask)
    return found


@functools.cache
def _threads() -> LLExecutor:
    return LLExecutor()


class Grammars:
    """Makes matchers for one checkpoint's vocabulary, and keeps what was compiled last.

    ``prepare`` compiles in a thread, so that no step waits for it.
    """

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of what is kept
        self._thread = ThreadPoolExecutor(1, "grammars")

    @classmethod
    def load(cls, folder: Path, eos_token_ids: Sequence[int]) -> "Grammars | None":
        """For the tokenizer in ``folder``; None if it has none that can be used. Takes a second for
        150,000 tokens."""
        eos = eos_token_ids[0] if eos_token_ids else None
        try:
            return cls(LLTokenizer(read_tokenizer_json(folder), eos_token=eos))
        except (TokenizerError, OSError, ValueError) as error:
            logger.warning("no structured output: %s", error)
            return None

    def prepare(self, grammar: Grammar) -> Future[LLMatcher] | None:
        """Compile a grammar, for ``matcher`` to find; None if it is there."""
        with self._lock:
            if grammar in self._compiled:
                return None
        return self._thread.submit(self._compile, grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        compiled = compile_grammar(self._tokenizer, grammar)
        if not compiled.is_error():
            compiled.compute_bitmask()  # every copy begins with what this has found out
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return compiled

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """A matcher at the beginning of the request's grammar; None if it has none. One that could
        not be compiled has an error."""
        if sampling.grammar is None:
            return None
        compiled = self._compile(sampling.grammar)
        return Matcher(compiled.deep_copy(), self._tokenizer, sampling.stop_token_ids)
