"""The one decoder: pre-norm blocks with grouped-query attention and SwiGLU.

Backbones differ by the flags of ``TextConfig`` only. Tokens of all rows are one flat batch;
which of them see each other is the attention backend's business.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.attention.base import AttentionStep
from model.layers import Activations, Embedding, Linear, RMSNorm
from model.mlp import MLP, Experts
from model.ops import Ops
from model.parallel import Group
from model.schema import TextConfig


class Attention(nn.Module):
    """Self-attention of one layer; queries, keys and values come from one product."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.eps) if config.qk_norm else None
        self._counts = [config.heads, config.kv_heads, config.kv_heads]

    def forward(self, normed: Activations, step: AttentionStep, layer: int, ops: Ops) -> Tensor:
        qkv = ops.linear(self.qkv, normed)
        if self.q_norm is not None and self.k_norm is not None:
            qkv = ops.head_norms(qkv, self._counts, self.q_norm, self.k_norm)
        return ops.linear(self.out, step(layer, qkv))


class DecoderLayer(nn.Module):
    """One block. Its last sum is left to the next norm, which computes both at once.

    Attention and MLP may be a rank's part of them, which is added up over the group.
    """

    def __init__(self, config: TextConfig, layer: int, group: Group) -> None:
        super().__init__()
        self._group = group
        self.norm1 = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.eps)
        experts = config.experts
        self.mlp: MLP | Experts
        if experts is None or layer in experts.dense:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = Experts(config.hidden_size, experts)

    def forward(
        self, hidden: Tensor, delta: Tensor | None, step: AttentionStep, layer: int, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """Hidden states ``[N, hidden]`` and what is to be added to them, in and out."""
        hidden, normed = ops.add_norm_for(hidden, delta, self.norm1, self.attention.qkv)
        delta = self._group.sum(self.attention(normed, step, layer, ops))
        if isinstance(self.mlp, MLP):
            hidden, normed = ops.add_norm_for(hidden, delta, self.norm2, self.mlp.gate_up)
        else:
            hidden, normed = ops.add_norm(hidden, delta, self.norm2)
        return hidden, self._group.sum(self.mlp(normed, ops))


class Decoder(nn.Module):
    """Embeddings ``[N, hidden]`` to the last hidden states of the ``wanted`` rows, or of all.

    With ``tied`` the embedding's matrix is the head's too. ``config`` is of one rank's part: stages
    behind the first have layers alone, and what they are given and give back has no meaning.
    """

    embedding: Embedding
    norm: RMSNorm
    head: Linear | None

    def __init__(self, config: TextConfig, *, tied: bool, group: Group) -> None:
        super().__init__()
        self._group = group
        vocab_size, size = config.vocab_size, config.hidden_size
        if group.stage == 0:
            self.embedding = Embedding(vocab_size, size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, group) for i in range(config.layers))
        if group.stage == 0:
            self.norm = RMSNorm(size, config.eps)
            self.head = None if tied else Linear(size, vocab_size, bias=False)

    def forward(
        self, embeddings: Tensor, step: AttentionStep, ops: Ops, wanted: Tensor | None = None
    ) -> Tensor:
        group = self._group
        if group.is_alone:
            whole = step.through(self.layers, self.norm, embeddings, ops, wanted)
            if whole is not None:
                return whole
        hidden: Tensor = embeddings
        delta: Any = None
        if group.stage:
            hidden, delta = group.receive(embeddings.new_empty(2, *embeddings.shape))
        for index, layer in enumerate(self.layers):
            hidden, delta = layer(hidden, delta, step, index, ops)
        if group.stages > 1:
            # What is still to be added too, so that sums are made where they always are.
            passed = torch.stack((hidden, delta))
            group.send(passed)
            if group.stage:
                return hidden
            hidden, delta = group.receive(passed)
        if wanted is not None:
            hidden, delta = hidden[wanted], delta[wanted]
        return ops.keep(ops.add_norm(hidden, delta, self.norm)[1])

    @property
    def like(self) -> Tensor:
        """A parameter that every stage has, and none is quantised to."""
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)  # noqa: S101 - for the type checker
        return first.norm1.weight

    @property
    def output(self) -> Embedding | Linear:
        """The layer whose matrix makes logits."""
        return self.embedding if self.head is None else self.head
