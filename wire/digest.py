"""Content digests. BLAKE2b with 32 bytes and a personalisation per use, so that a digest made
for one purpose can never be mistaken for one made for another."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

Buffer = bytes | bytearray | memoryview


def content_digest(encoded: Buffer) -> bytes:
    """Digest of a file's encoded bytes, and of nothing else."""
    return hashlib.blake2b(encoded, digest_size=32, person=b"internvl-bytes").digest()


def media_digest(parts: Iterable[Buffer]) -> bytes:
    """Digest of a picture's content digest, of everything that decides its tiles, and of a salt."""
    digest = hashlib.blake2b(digest_size=32, person=b"internvl-media")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def checkpoint_digest(folder: Path) -> bytes:
    """Digest of a checkpoint's configuration and of its weights' names and sizes."""
    digest = hashlib.blake2b(digest_size=32, person=b"internvl-checks")
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.digest()
