"""``python -m server.grammar_worker``: compiles clients' grammars, to see whether it can be done.

A process of its own, because a hostile grammar can overflow a stack or never end, and no thread
can be stopped. Reads a ``Vocabulary`` and then grammars from its standard input, one JSON object
a line, and answers each with a line: null, or what is wrong with it. It is killed by the kernel
when a grammar takes too much processor time, and ends with its input.
"""

import resource
import signal
import sys

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from wire.grammar import compile_grammar, complaint
from wire.sampling import Grammar

COMPILE_SECONDS = 0.5
"""Of processor time. What is accepted takes the engine as long, in a thread beside its steps."""
_MEMORY = 1 << 30


class Vocabulary(msgspec.Struct):
    """``size`` ids, and the names of those that stand outside of text."""

    size: int
    special: dict[int, str]


class _Bytes:
    """A tokenizer of single bytes and special tokens: what it can spell, every tokenizer of the
    same special tokens can."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        free = (i for i in range(vocabulary.size + 257) if i not in vocabulary.special)
        self._ids = [next(free) for _ in range(256)]
        self.eos_token_id = next(free)
        size = max(vocabulary.size, self.eos_token_id + 1)
        self.tokens = [b""] * size
        for byte, token in enumerate(self._ids):
            self.tokens[token] = bytes([byte])
        for token, name in vocabulary.special.items():
            self.tokens[token] = name.encode()
        self.tokens[self.eos_token_id] = b"<|the end|>"
        self.special_token_ids = [*vocabulary.special, self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return [self._ids[byte] for byte in data]


def examine(tokenizer: LLTokenizer, grammar: Grammar) -> str | None:
    """What is wrong with a grammar."""
    matcher = compile_grammar(tokenizer, grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
        if matcher.is_stopped() and not (matcher.is_accepting() or matcher.is_error()):
            return "nothing matches it"
    return complaint(matcher)


def main() -> None:
    """Answer until the input ends."""
    # They reach the whole group; whoever asks decides when this process is not needed any more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = msgspec.json.decode(sys.stdin.buffer.readline(), type=Vocabulary)
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(vocabulary)))
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)
        found = examine(tokenizer, grammar)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
