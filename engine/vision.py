"""Raw tiles of requests, the encoder outputs made of them, and their way into a step's batch.

The scheduler decides what is encoded and what is dropped; this file only obeys, and holds the
tensors. Tiles stay uint8 until the model normalises them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import EncodeItem, VisionSpan
from model import InternVL
from wire.channel import Buffer

# Tiles per forward pass: enough to fill the machine, few enough to bound the activations.
_CHUNK = {"cpu": 4, "cuda": 16}


class EncoderOutputs:
    """Encoded pictures by digest, ``[tokens, hidden]`` each, and the tiles still to encode."""

    def __init__(self, model: InternVL) -> None:
        self._model = model
        self._side = model.config.geometry.tile_size
        self._chunk = _CHUNK.get(model.device.type, 4)
        self._tiles: dict[str, list[Tensor]] = {}
        self._outputs: dict[bytes, Tensor] = {}

    def upload(self, request_id: str, buffers: Sequence[Buffer]) -> None:
        """Keep a request's tiles, one buffer of uint8 ``[T, 3, side, side]`` per picture."""
        self._tiles[request_id] = [
            # A bytearray is taken over as it is; read-only memory would make torch complain.
            torch.frombuffer(
                buffer if isinstance(buffer, bytearray) else bytearray(buffer), dtype=torch.uint8
            ).view(-1, 3, self._side, self._side)
            for buffer in buffers
        ]

    def forget(self, request_id: str) -> None:
        """Drop a request's tiles; unknown ids are ignored."""
        self._tiles.pop(request_id, None)

    def drop(self, digest: bytes) -> None:
        """Drop an encoder output."""
        del self._outputs[digest]

    def encode(self, items: Sequence[EncodeItem]) -> None:
        """Encode pictures, their tiles batched across pictures."""
        if not items:
            return
        tiles = torch.cat([self._tiles[item.request_id][item.buffer] for item in items])
        encoded = torch.cat([self._model.encode_tiles(part) for part in tiles.split(self._chunk)])
        parts = encoded.split([item.tiles for item in items])
        for item, part in zip(items, parts, strict=True):
            self._outputs[item.digest] = part.flatten(0, 1).clone()

    def place(
        self, embeddings: Tensor, spans: Sequence[VisionSpan], position: int, at: int, count: int
    ) -> None:
        """Overwrite a row's picture tokens in the flat batch.

        The row's positions ``position : position + count`` stand at ``embeddings[at:]``.
        """
        for span in spans:
            start = max(span.offset, position)
            end = min(span.offset + span.length, position + count)
            if start < end:
                part = self._outputs[span.digest][start - span.offset : end - span.offset]
                embeddings[at + start - position : at + end - position] = part
