"""Text from tokens as they arrive. Bytes of a character that is not complete yet are held back,
so a client never sees half of one; what can never become a character is U+FFFD, as in the
reference decoder."""

import codecs
from collections.abc import Iterable

from server.tokenizer import Tokenizer


class Detokenizer:
    """One sequence's text. ``push`` what was generated, then ``flush`` once.

    One that ``continues`` a text begins with whatever space its first token has.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space and not continues

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is certain after these tokens."""
        return self._decoder.decode(self.data(tokens))

    def data(self, tokens: Iterable[int]) -> bytes:
        """The bytes that the next tokens add to a text. For those who need no ``push``."""
        data = b"".join(
            [self._tokenizer.token_bytes(token) for token in tokens if token not in self._skipped]
        )
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return data

    def flush(self) -> str:
        """What was still held back."""
        return self._decoder.decode(b"", final=True)
