"""What KV-cache blocks hold: digests of full ones, and which begin alike.

The digest of a block covers everything that its keys and values depend on: every token up to its
end and the pictures among them. It chains: parent digest, the block's own tokens, and for each
picture that overlaps the block the digest of the picture with its place relative to the block
(the same context tokens, shifted, hold other features) and its position step. The first parent is
made of the salt.

Behind the full blocks that are found, another may begin as a sequence goes on, and be copied that
far (``Parts``).
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from wire.messages import VisionItem

_PERSON = b"internvl-block"

# Positions at the beginning of a block are found by so many at a time. One by one, another's prompt
# could be guessed one token after the other; at most seven tokens are computed again for that. The
# end of a picture tells nothing to who does not have the picture.
GRAIN = 8
_TOKEN_BYTES = array("i").itemsize
# Blocks that are known behind one and the same other: what an admission looks at is bounded.
_MOST_BEHIND = 64


class Part(NamedTuple):
    """What stands at the beginning of a block: tokens, int32 each, and the pictures among them."""

    tokens: bytes
    # Place relative to the block, digest, step, tokens.
    items: tuple[tuple[int, bytes, float, int], ...]


def first_parent(salt: bytes) -> bytes:
    """What the first block of a sequence chains to; other salts never share a block."""
    return hashlib.blake2b(salt, digest_size=32, person=_PERSON).digest()


def extend_digests(
    digests: list[bytes],
    token_ids: Sequence[int],
    items: Sequence[VisionItem],
    block_size: int,
    salt: bytes,
) -> None:
    """Append the digests of all full blocks that ``digests`` lacks. ``items`` stand in order."""
    for number in range(len(digests), len(token_ids) // block_size):
        tokens, shown = part_of(token_ids, items, number * block_size, (number + 1) * block_size)
        digest = hashlib.blake2b(
            digests[-1] if digests else first_parent(salt), digest_size=32, person=_PERSON
        )
        digest.update(tokens)
        for place, picture, step, _ in shown:
            digest.update(len(picture).to_bytes(8, "little"))
            digest.update(picture)
            digest.update(struct.pack("<qd", place, step))
        digests.append(digest.digest())


def part_of(token_ids: Sequence[int], items: Sequence[VisionItem], start: int, end: int) -> Part:
    """What stands at positions ``start : end`` of a sequence, where a block begins at ``start``."""
    shown = (
        (item.offset - start, item.digest, item.step, item.length)
        for item in items
        if item.offset < end and item.offset + item.length > start
    )
    return Part(array("i", token_ids[start:end]).tobytes(), tuple(shown))


def count_common(one: Part, other: Part) -> int:
    """How many positions begin both, in whole grains or up to the end of a picture."""
    most = min(len(one.tokens), len(other.tokens)) // _TOKEN_BYTES
    ends = []
    for pair in zip_longest(one.items, other.items):
        if pair[0] != pair[1]:
            place = min(item[0] for item in pair if item is not None)
            most = min(most, max(0, place))
            break
        ends.append(pair[0][0] + pair[0][3])
    same = 0
    for end in sorted([*range(GRAIN, most + 1, GRAIN), *(end for end in ends if 0 < end <= most)]):
        some = slice(same * _TOKEN_BYTES, end * _TOKEN_BYTES)
        if one.tokens[some] != other.tokens[some]:
            break
        same = end
    return same


class Parts:
    """Which blocks begin with what, by the digest of the block before them."""

    def __init__(self) -> None:
        self._behind: dict[bytes, dict[Part, int]] = {}
        self._places: dict[int, tuple[bytes, Part]] = {}

    @property
    def blocks(self) -> set[int]:
        """Those that can be found."""
        return set(self._places)

    def note(self, block: int, parent: bytes, part: Part) -> None:
        """Let a block be found. It takes the place of one that holds the same, or else of the one
        noted first where there are enough."""
        for gone in (block, self._behind.get(parent, {}).get(part)):
            if gone is not None:
                self.forget(gone)
        behind = self._behind.setdefault(parent, {})
        if len(behind) == _MOST_BEHIND:
            self.forget(next(iter(behind.values())))
        behind[part] = block
        self._places[block] = parent, part

    def find(self, parent: bytes, wanted: Part) -> tuple[int, int]:
        """A block that has the most of what is wanted, and how many positions; 0: none has any."""
        behind = self._behind.get(parent, {})
        counts = ((count_common(part, wanted), block) for part, block in behind.items())
        count, block = max(counts, default=(0, 0))
        return block, count

    def forget(self, block: int) -> None:
        """Let a block be found no more; others are ignored."""
        if (place := self._places.pop(block, None)) is not None:
            parent, part = place
            del self._behind[parent][part]
            if not self._behind[parent]:
                del self._behind[parent]

    def forget_behind(self, parent: bytes) -> None:
        """Let nothing be found behind a block."""
        for block in self._behind.pop(parent, {}).values():
            del self._places[block]

    def check(self) -> None:
        """Raise AssertionError where the two ways to look disagree."""
        found = {
            block: (parent, part)
            for parent, behind in self._behind.items()
            for part, block in behind.items()
        }
        assert found == self._places, "a block is found in a place that is not its own"
        assert all(0 < len(behind) <= _MOST_BEHIND for behind in self._behind.values())
