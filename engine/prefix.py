"""Content digests of full KV-cache blocks.

The digest of a block covers everything that its keys and values depend on: every token up to its
end and the pictures among them. It chains: parent digest, the block's own tokens, and for each
picture that overlaps the block the digest of the picture with its place relative to the block
(the same context tokens, shifted, hold other features) and its position step. The first parent is
made of the salt.
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence

from wire.messages import VisionItem

_PERSON = b"internvl-block"


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
        start, end = number * block_size, (number + 1) * block_size
        digest = hashlib.blake2b(
            digests[-1] if digests else first_parent(salt), digest_size=32, person=_PERSON
        )
        digest.update(array("i", token_ids[start:end]).tobytes())
        for item in items:
            if item.offset < end and item.offset + item.length > start:
                digest.update(len(item.digest).to_bytes(8, "little"))
                digest.update(item.digest)
                digest.update(struct.pack("<qd", item.offset - start, item.step))
        digests.append(digest.digest())
