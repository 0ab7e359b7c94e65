"""The whole model: tiles to token embeddings, ids to embeddings, embeddings to logits.

The engine calls it with flat batches. It keeps no state between calls; what must be kept lies in
the KV cache, and pictures that were encoded are the engine's.
"""

import torch
from torch import Tensor, nn

from model.attention.base import AttentionBackend, AttentionBatch, AttentionStep
from model.decoder import Decoder
from model.kv_cache import KVCache
from model.ops import Ops
from model.parallel import Group
from model.projector import Projector
from model.rotary import angles, inverse_frequencies
from model.schema import ModelConfig, TextConfig
from model.transfer import to_device
from model.vision import VisionModel


class InternVL(nn.Module):
    """InternViT, projector and decoder. Built by ``model.build_model``, which fills it.

    ``text`` is this rank's part of the decoder; ``config`` tells of the whole. Only the first stage
    of ``group`` has anything but layers of the decoder, and can encode, embed and make logits.
    """

    vision: VisionModel
    projector: Projector

    def __init__(self, config: ModelConfig, text: TextConfig, *, tied: bool, group: Group) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.group = group
        self.ops = Ops()
        self.parameter_count = 0  # as stored
        self._statistics: tuple[Tensor, Tensor] | None = None  # of pixels: mean and deviation
        self._frequencies: Tensor | None = None  # of rotary positions
        if group.stage == 0:
            self.vision = VisionModel(config.vision)
            self.projector = Projector(config.projector)
        self.decoder = Decoder(self.text, tied=tied, group=group)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.like.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and hidden states."""
        return self.decoder.like.dtype

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """uint8 ``[T, 3, side, side]`` to embeddings ``[T, tokens_per_tile, hidden]``."""
        if self._statistics is None:  # once: a graph must not read memory of the host
            geometry = self.config.geometry
            mean, std = to_device([geometry.mean, geometry.std], self.device).view(2, 3, 1, 1) * 255
            self._statistics = mean, std
        mean, std = self._statistics
        ops, side = self.ops, self.config.vision.patch_size
        patches = ops.patches(tiles.to(self.device), mean, std, side, self.dtype)
        return ops.keep(self.projector(self.vision(patches, ops), ops))

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``[N]`` to embeddings ``[N, hidden]``."""
        group = self.group
        if group.stage:
            return torch.empty(len(ids), self.text.hidden_size, dtype=self.dtype, device=ids.device)
        embedding = self.decoder.embedding
        if group.size == 1:
            return self.ops.embed(embedding, ids)
        # Each rank knows some, and has zeros for the others.
        rows = ids - group.rank * self.text.vocab_size
        others = (rows < 0) | (rows >= self.text.vocab_size)
        found = self.ops.embed(embedding, rows.masked_fill(others, 0))
        return group.sum(found.masked_fill(others[:, None], 0))

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        attention: AttentionBackend,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embeddings ``[N, hidden]`` to hidden states, at ``positions`` [N], which may be fractions
        in fp32: of the ``wanted`` rows, int64 in ascending order, or of all ``[N, hidden]``. Later
        stages take only the shape of the one, and what they give has no meaning.
        """
        text = self.text
        if self._frequencies is None:  # likewise
            self._frequencies = inverse_frequencies(text.head_dim, text.rope_theta, self.device)
        # A step's few cosines cost less than a table that has to follow the device about.
        step = AttentionStep(attention, batch, kv, angles(positions, self._frequencies))
        hidden: Tensor = self.decoder(embeddings, step, self.ops, wanted)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[M, hidden]`` to fp32 logits ``[M, vocab]``."""
        logits = self.ops.logits(self.decoder.output, hidden)
        if self.group.size == 1:
            return logits
        return self.group.gather(logits)[:, : self.config.vocab_size].contiguous()

    def draw(self, hidden: Tensor) -> Tensor | None:
        """The likeliest tokens, int64 ``[M]``, if they can be had without the logits."""
        return self.ops.draw(self.decoder.output, hidden) if self.group.is_alone else None
