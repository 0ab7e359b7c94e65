"""The operations of the model, one call per piece that some device computes as one.

This class is the reference: plain torch, on every device and for every type. Subclasses fuse, pack
weights and choose other layouts, and may be told apart by their speed and their last bits alone.
"""

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import Activations, Embedding, LayerNorm, Linear, RMSNorm


class Ops:
    """See the module. A hidden state that is passed in may be overwritten where it says so."""

    name: ClassVar[str] = "torch"
    experts_wait = True
    """Whether ``experts`` waits for the device, to know who is chosen."""

    def prepare(
        self,
        modules: Sequence[nn.Module],
        head: Embedding | Linear | None,
        decoding: Collection[nn.Module] = (),
        *,
        draws: bool = True,
    ) -> None:
        """Bring the weights of a model that was just loaded into the form the operations want.

        ``head`` is the module among them that makes logits, if one does, and ``draws`` whether
        ``draw`` is asked for it; ``decoding`` are those that a step of one token reads, so that
        their size counts.
        """

    def patches(
        self, tiles: Tensor, mean: Tensor, std: Tensor, side: int, dtype: torch.dtype
    ) -> Tensor:
        """uint8 ``[T, C, S, S]`` normalised and cut into squares, row by row, each its channels one
        behind the other: ``[T, (S / side) ** 2, C * side ** 2]``.

        ``mean`` and ``std`` are fp32 ``[C, 1, 1]``, of samples from 0 to 255.
        """
        normal = ((tiles.float() - mean) / std).to(dtype)
        squares = normal.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def tiles_at_once(self, device: torch.device) -> int:
        """Tiles per pass of the encoder: enough to fill the machine, few enough to bound the
        activations."""
        return 16 if device.type == "cuda" else 4

    def linear(self, layer: Linear, x: Activations) -> Tensor:
        """``[..., inputs] -> [..., outputs]``."""
        return layer.forward(x)  # type: ignore[arg-type]  # what is rounded is for who takes it

    def linear_gelu(self, layer: Linear, x: Activations) -> Tensor:
        """A linear layer and the exact GELU, by the error function."""
        return functional.gelu(self.linear(layer, x))

    def linear_gelu_for(self, layer: Linear, x: Activations, taker: Linear) -> Activations:
        """The same for ``taker`` alone, which may want it in float8."""
        return self.linear_gelu(layer, x)

    def gate_up(self, layer: Linear, x: Activations) -> Tensor:
        """``silu(gate) * up``, ``[N, outputs / 2]``; gates are the first half of the rows."""
        gate, up = self.linear(layer, x).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def gate_up_for(self, layer: Linear, x: Activations, taker: Linear) -> Activations:
        """The same for ``taker`` alone."""
        return self.gate_up(layer, x)

    def experts(self, mlps: nn.ModuleList, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """``[N, hidden]``: of each row what its MLPs make of it, those that ``chosen`` int64
        ``[N, K]`` numbers, by their ``shares`` ``[N, K]``."""
        mixed = torch.zeros_like(x)
        # In the experts' order: a token's sum must not depend on the tokens beside it.
        for index in chosen.unique().tolist():
            rows, place = (chosen == index).nonzero(as_tuple=True)
            found = mlps[index](x[rows], self)
            mixed[rows] += found * shares[rows, place, None]
        return mixed

    def norm(self, x: Tensor, norm: LayerNorm | RMSNorm) -> Tensor:
        """The norm of every row of ``[..., size]``."""
        return norm(x)

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """``hidden + delta``, which may take the place of ``hidden``, and the norm of that.

        Without a ``delta`` there is nothing to add.
        """
        if delta is not None:
            hidden = hidden + delta
        return hidden, self.norm(hidden, norm)

    def add_norm_for(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm, taker: Linear
    ) -> tuple[Tensor, Activations]:
        """The same where the norm is for ``taker`` alone."""
        return self.add_norm(hidden, delta, norm)

    def head_norms(
        self, qkv: Tensor, counts: Sequence[int], q_norm: RMSNorm, k_norm: RMSNorm
    ) -> Tensor:
        """``[N, heads * head_dim]``, which may be overwritten, with the norm of every query head
        and of every key head; ``counts`` are of query, key and value heads."""
        heads = qkv.unflatten(-1, (sum(counts), -1)).split(list(counts), dim=1)
        normed = (self.norm(heads[0], q_norm), self.norm(heads[1], k_norm), heads[2])
        return torch.cat(normed, dim=1).flatten(1)

    def vision_attention(
        self, qkv: Tensor, heads: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        """Attention of all patches of a tile to each other: ``[T, P, 3 * size] -> [T, P, size]``.

        The norms of queries and keys span all heads.
        """
        query, key, value = qkv.chunk(3, dim=-1)
        if q_norm is not None and k_norm is not None:
            query, key = self.norm(query, q_norm), self.norm(key, k_norm)
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)

    def keep(self, x: Tensor) -> Tensor:
        """A result that outlives the forward pass; others are gone when it ends."""
        return x

    def logits(self, layer: Embedding | Linear, hidden: Tensor) -> Tensor:
        """``[M, hidden] -> [M, vocab]`` in fp32, there until the next logits are made."""
        return functional.linear(hidden, layer.weight).float()

    def draw(self, layer: Embedding | Linear, hidden: Tensor) -> Tensor | None:
        """What ``engine.sampling.sampler.sample_plain`` draws from the logits of ``[M, hidden]``:
        int64 ``[M]``. None if it would take logits."""
        return None

    def embed(self, layer: Embedding, ids: Tensor) -> Tensor:
        """Token ids ``[N]`` to rows ``[N, size]``."""
        return functional.embedding(ids, layer.weight)
