"""The one decoder: pre-norm blocks with grouped-query attention and SwiGLU.

Backbones differ by the flags of ``TextConfig`` only. Tokens of all rows are one flat batch;
which of them see each other is the attention backend's business.
"""

from torch import Tensor, nn
from torch.nn import functional

from model.attention.base import AttentionStep
from model.layers import Embedding, Linear, RMSNorm
from model.rotary import Angles, angles, inverse_frequencies, rotate
from model.schema import TextConfig


class Attention(nn.Module):
    """Self-attention of one layer; queries, keys and values come from one product."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._heads, self._kv_heads = config.heads, config.kv_heads
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, bias=config.out_bias)

    def forward(self, hidden: Tensor, at: Angles, step: AttentionStep, layer: int) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (self._heads + 2 * self._kv_heads, -1))
        both = self._heads + self._kv_heads
        turned = rotate(heads[:, :both], at)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        return self.out(step(layer, query, key, heads[:, both:]).flatten(1))


class DecoderLayer(nn.Module):
    """One block ``[N, hidden] -> same``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.eps)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, at: Angles, step: AttentionStep, layer: int) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden), at, step, layer)
        gate, up = self.gate_up(self.norm2(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    """Embeddings ``[N, hidden]`` to the last hidden states ``[N, hidden]``.

    With ``tied`` the embedding's matrix is the head's too.
    """

    def __init__(self, config: TextConfig, *, tied: bool) -> None:
        super().__init__()
        self._config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, embeddings: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        config = self._config
        # A step's few cosines cost less than a table that has to follow the device about.
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, positions.device)
        at = angles(positions, frequencies)
        hidden = embeddings
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, at, step, index)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[M, hidden] -> [M, vocab]`` in the model's dtype."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight)
