"""Raw tiles of requests, the encoder outputs made of them, and their way into a step's batch.

An encoder output has its whole size from its picture's first tile on; the rows of tiles that were
not encoded are undefined, and nobody reads them.

The scheduler decides what is encoded and what is dropped; this file only obeys, and holds the
tensors. Tiles stay uint8 until the model normalises them.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.clock import Moment, moment, seconds_between
from engine.graphs import TileGraphs
from engine.plan import EncodeItem, VisionSpan
from model import InternVL
from wire.channel import Buffer
from wire.messages import EngineRequest


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A step's work of the encoder, launched: how many tiles each item has in it, and
    when it began and ended."""

    tiles: list[int]
    began: Moment
    ended: Moment

    def seconds(self) -> list[float]:
        """What each item took, by its share of the tiles. The device must be done with it."""
        spent = seconds_between(self.began, self.ended)
        return [spent * count / sum(self.tiles) for count in self.tiles]


class EncoderOutputs:
    """Encoded pictures by digest, ``[tokens, hidden]`` each, and the tiles still to encode.

    Tiles are kept once, however many requests show the same picture. ``chunk`` tiles go through
    the encoder at once; 0 leaves it to the operations. ``graphs`` takes the encoder's place.
    """

    def __init__(self, model: InternVL, chunk: int = 0, graphs: TileGraphs | None = None) -> None:
        self._model = model
        self._graphs = graphs
        self._side = model.config.geometry.tile_size
        self.chunk = chunk or model.ops.tiles_at_once(model.device)
        self._tiles: dict[bytes, Tensor] = {}
        self._users: dict[bytes, int] = {}  # requests per picture
        self._shown: dict[str, set[bytes]] = {}  # pictures of each request
        self._outputs: dict[bytes, Tensor] = {}

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        """Keep a request's tiles, one buffer of uint8 ``[T, 3, side, side]`` per picture."""
        self._shown[request.id] = {item.digest for item in request.items}
        for digest in self._shown[request.id]:
            self._users[digest] = self._users.get(digest, 0) + 1
        for item in request.items:
            if item.digest not in self._tiles:
                buffer = buffers[item.buffer]
                # A bytearray is taken over as it is; read-only memory would make torch complain.
                own = buffer if isinstance(buffer, bytearray) else bytearray(buffer)
                tiles = torch.frombuffer(own, dtype=torch.uint8)
                if self._model.device.type == "cuda":
                    tiles = tiles.pin_memory()  # so that nobody waits for them to be copied
                self._tiles[item.digest] = tiles.view(-1, 3, self._side, self._side)

    def forget(self, request_id: str) -> None:
        """Drop the tiles that only this request shows; unknown ids are ignored."""
        for digest in self._shown.pop(request_id, ()):
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest], self._tiles[digest]

    def drop(self, digest: bytes) -> None:
        """Drop an encoder output."""
        del self._outputs[digest]

    def encode(self, items: Sequence[EncodeItem]) -> Encoding | None:
        """Encode tiles, batched across pictures."""
        if not items:
            return None
        began = moment(self._model.device)
        parts = [self._tiles[item.digest][item.start : item.start + item.tiles] for item in items]
        tiles = torch.cat([part.to(self._model.device, non_blocking=True) for part in parts])
        encoded = self._encode(tiles) if self._model.group.size == 1 else self._shared_out(tiles)
        counts = [item.tiles for item in items]
        for item, part in zip(items, encoded.split(counts), strict=True):
            tokens = part.shape[1]
            output = self._outputs.get(item.digest)
            if output is None:
                size = len(self._tiles[item.digest]) * tokens, part.shape[2]
                output = self._outputs[item.digest] = part.new_empty(size)
            output[item.start * tokens :][: item.tiles * tokens] = part.flatten(0, 1)
        return Encoding(counts, began, moment(self._model.device))

    def _encode(self, tiles: Tensor) -> Tensor:
        encode = self._graphs or self._model.encode_tiles
        return torch.cat([encode(part) for part in tiles.split(self.chunk)])

    def _shared_out(self, tiles: Tensor) -> Tensor:
        """The same, where every rank encodes some of the tiles; the last ones may have none."""
        group, config = self._model.group, self._model.config
        count = -(-len(tiles) // group.size)
        shape = count, config.geometry.tokens_per_tile, config.text.hidden_size
        encoded = torch.zeros(shape, dtype=self._model.dtype, device=tiles.device)
        own = tiles[group.rank * count :][:count]
        if len(own):
            encoded[: len(own)] = self._encode(own)
        return group.gather(encoded, 0)[: len(tiles)]

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


class NoOutputs(EncoderOutputs):
    """In their place where there is no encoder: in the stages behind the first, where pictures come
    as hidden states."""

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        pass

    def drop(self, digest: bytes) -> None:
        pass

    def encode(self, items: Sequence[EncodeItem]) -> Encoding | None:
        now = moment(self._model.device)
        return Encoding([item.tiles for item in items], now, now) if items else None

    def place(
        self, embeddings: Tensor, spans: Sequence[VisionSpan], position: int, at: int, count: int
    ) -> None:
        pass
