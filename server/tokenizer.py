"""Text to ids and ids to bytes, for the tokenizer of one checkpoint.

Text is encoded with every added token switched off: whatever a client types, only bytes come
out. The prompt builder puts special tokens between such texts by their id. Ids are mapped to
bytes one by one, so that a stream can be decoded in constant time per token.
"""

import collections
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as RustTokenizer

from wire.tokenizer_file import TokenizerError, read_tokenizer_json

_PIECE = 1 << 16  # characters looked at before other threads may run


class Tokenizer:
    """Encode text, look tokens up, and turn ids into bytes. Safe to share between threads.

    ``added`` are the names of the tokens that were not learned from text, by id; ``special_ids``
    are those of them that the checkpoint marks as special: they are left out of visible text.
    ``bos`` stands before every prompt (empty for Qwen2-based models).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` is the parsed content of a tokenizer.json."""
        added = spec["added_tokens"]
        self.added: dict[int, str] = {token["id"]: token["content"] for token in added}
        self.special_ids = frozenset(token["id"] for token in added if token["special"])
        reference = RustTokenizer.from_str(json.dumps(spec))
        self.bos: tuple[int, ...] = tuple(reference.encode("").ids)
        # Special everywhere plus encode_special_tokens: no added token is recognised in text.
        plain = {**spec, "added_tokens": [{**token, "special": True} for token in added]}
        self._plain = RustTokenizer.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        decoders = _decoders(spec.get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self.strips_first_space = "Strip" in decoders
        # Both have an entry per token of the vocabulary at most: what the engine names.
        self._bytes: dict[int, bytes] = {}
        self._shown: dict[int, tuple[str, msgspec.Raw]] = {}
        self._share = self._shares()

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer in ``folder``; raises TokenizerError. Slow: call it in a thread."""
        try:
            return cls(json.loads(read_tokenizer_json(folder)))
        except (TokenizerError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the Rust library raises plain Exception, and panics
            raise TokenizerError(f"the tokenizer in {folder} cannot be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in which every token name is plain text."""
        # As a batch of one: only then does the library let other threads run meanwhile.
        return list(self._plain.encode_batch([text], add_special_tokens=False)[0].ids)

    def naming(self, names: Iterable[str]) -> Callable[[str], list[int]]:
        """An ``encode`` in which those of ``names`` that are tokens stand for themselves."""
        found = {name: self.token_id(name) for name in names}
        known = {name: token for name, token in found.items() if token is not None}
        if not known:
            return self.encode
        # Of two that begin alike the longer one is meant.
        longest_first = sorted(known, key=len, reverse=True)
        split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

        def encode(text: str) -> list[int]:
            ids: list[int] = []
            for part in split(text):
                if part in known:
                    ids.append(known[part])
                elif part:
                    ids += self.encode(part)
            return ids

        return encode

    def least(self, text: str, enough: int) -> int:
        """How many tokens ``text`` has at the very least. Far quicker than to encode it; the
        counting stops at ``enough``."""
        normalizer = self._plain.normalizer
        found = 0.0
        for start in range(0, len(text), _PIECE):
            piece = text[start : start + _PIECE]
            if normalizer is not None:
                piece = normalizer.normalize_str(piece)
            counts = collections.Counter(piece.encode())
            # One less, for what the normalizer does across the border of two pieces.
            found += sum(self._share[byte] * count for byte, count in counts.items()) - 1
            if found >= enough:
                break
        return max(0, int(found))

    def _shares(self) -> list[float]:
        """For each byte, 1 / the length of the longest token that has it. The shares of a token's
        bytes add up to 1 at most, so the shares of a text's bytes to its tokens at most."""
        longest = [0] * 256
        for token in self._plain.get_vocab().values():
            data = self._decode(token)
            for byte in data:
                longest[byte] = max(longest[byte], len(data))
        return [1 / length if length else 0.0 for length in longest]

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, None if the checkpoint does not have it."""
        found: int | None = self._plain.token_to_id(token)
        return found

    def names(self, tokens: Iterable[int]) -> list[str]:
        """The vocabulary's own entries; empty for ids that the tokenizer does not know."""
        return [self._plain.id_to_token(token) or "" for token in tokens]

    def token_bytes(self, token: int) -> bytes:
        """What ``token`` adds to the text; empty for ids the tokenizer does not know."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._decode(token)
        return found

    def shown(self, token: int) -> tuple[str, msgspec.Raw]:
        """``token`` as log-probabilities show it: its text, and its bytes as a JSON array."""
        found = self._shown.get(token)
        if found is None:
            data = self.token_bytes(token)
            text = data.decode("utf-8", "replace")
            found = self._shown[token] = text, msgspec.Raw(msgspec.json.encode(list(data)))
        return found

    def _decode(self, token: int) -> bytes:
        if token in self.added:
            return self.added[token].encode()
        text = self._plain.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in text)
            except KeyError:
                return str(text).encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return str(text).replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level alphabet, each with its byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoders(spec: dict[str, Any] | None) -> set[str]:
    if spec is None:
        return set()
    return {spec["type"]} | {name for part in spec.get("decoders", ()) for name in _decoders(part)}
