"""The operations on CUDA devices: matrix products by torch, what is between them by Triton."""

import torch
from torch import Tensor
from torch.nn import functional

from model.layers import LayerNorm, Linear, RMSNorm
from model.ops.base import Ops
from model.triton import fused, pixels


class TritonOps(Ops):
    """See the module. Sums overwrite the hidden state that they are added to."""

    name = "triton"

    def patches(
        self, tiles: Tensor, mean: Tensor, std: Tensor, side: int, dtype: torch.dtype
    ) -> Tensor:
        return pixels.patches(tiles, mean, std, side, dtype)

    def linear_gelu(self, layer: Linear, x: Tensor) -> Tensor:
        return fused.bias_gelu_(functional.linear(x, layer.weight), layer.bias)

    def gate_up(self, layer: Linear, x: Tensor) -> Tensor:
        return fused.silu_mul(self.linear(layer, x))

    def norm(self, x: Tensor, norm: LayerNorm | RMSNorm) -> Tensor:
        return self.add_norm(x, None, norm)[1]

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm
    ) -> tuple[Tensor, Tensor]:
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        return fused.add_norm(hidden, delta, norm.weight, bias, norm.eps)
