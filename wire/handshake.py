"""How two processes of different hosts come to trust each other, before a byte is decoded.

The leader of a group sends a challenge. Who dialled answers with bytes of his own, what he offers,
and a proof over all of it that he knows the secret; the leader proves the same. Everything has a
fixed size. The secret itself never travels, and what was said once proves nothing a second time.
What comes afterwards is neither encrypted nor signed: this is for networks of one's own.
"""

import hmac
import importlib.metadata
import secrets
import struct
from pathlib import Path
from typing import NamedTuple

from wire.settings import SettingError

CHALLENGE = 32  # bytes, of random numbers
PROOF = 32  # bytes, of an HMAC with SHA-256
_LEAST = 16  # bytes of a secret
_VERSION = 26  # bytes
_OFFER = struct.Struct(f"<HHH{_VERSION}s")
CALL = CHALLENGE + _OFFER.size + PROOF
"""Bytes of what is answered to a challenge."""


class Offer(NamedTuple):
    """Who comes: one of the ``processes`` of host ``node``, from 1 on, and which version of this
    program it is."""

    node: int
    process: int
    processes: int
    version: str


def read_secret(file: str) -> bytes:
    """The secret of a group, without the white space around it. Raises SettingError."""
    if not file:
        raise SettingError("rank_secret_file must be given where there are several nodes")
    try:
        secret = Path(file).expanduser().read_bytes().strip()
    except (OSError, RuntimeError) as error:
        raise SettingError(f"rank_secret_file cannot be read: {error}") from None
    if len(secret) < _LEAST:
        raise SettingError(f"rank_secret_file: a secret has at least {_LEAST} bytes")
    return secret


def version() -> str:
    """Of this program; all hosts of a group must have the same."""
    try:
        return importlib.metadata.version("internvl-server")[:_VERSION]
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def challenge() -> bytes:
    """Another one for each who comes."""
    return secrets.token_bytes(CHALLENGE)


def call(secret: bytes, offer: Offer, challenged: bytes) -> bytes:
    """What is answered to a challenge, ``CALL`` bytes."""
    numbers, name = offer[:3], offer.version.encode()
    said = secrets.token_bytes(CHALLENGE) + _OFFER.pack(*numbers, name)
    return said + _proof(secret, b"rank", challenged, said)


def hear(secret: bytes, challenged: bytes, called: bytes) -> Offer | None:
    """What is offered in an answer to a challenge; None from who does not know the secret."""
    said = called[:-PROOF]
    if not hmac.compare_digest(_proof(secret, b"rank", challenged, said), called[-PROOF:]):
        return None
    node, process, processes, version = _OFFER.unpack(said[CHALLENGE:])
    return Offer(node, process, processes, version.rstrip(b"\0").decode(errors="replace"))


def answer(secret: bytes, challenged: bytes, called: bytes) -> bytes:
    """The leader's proof, for whom it has heard; ``PROOF`` bytes."""
    return _proof(secret, b"leader", challenged, called[:-PROOF])


def is_leader(secret: bytes, challenged: bytes, called: bytes, answered: bytes) -> bool:
    """Whether the answer to a call proves that the leader, too, knows the secret."""
    return hmac.compare_digest(answer(secret, challenged, called), answered)


def _proof(secret: bytes, role: bytes, challenged: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + challenged + said, "sha256")
