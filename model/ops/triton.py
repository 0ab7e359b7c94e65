"""The operations on CUDA devices: matrix products by torch, what is between them by Triton."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import Activations, Embedding, LayerNorm, Linear, RMSNorm, Router
from model.ops.base import Ops
from model.quantize import Fp8Linear
from model.triton import experts, fused, pixels, quantize


class TritonOps(Ops):
    """See the module. Sums overwrite the hidden state that they are added to."""

    name = "triton"

    def __init__(self) -> None:
        self._stacked: dict[nn.ModuleList, tuple[Tensor, Tensor]] = {}

    def prepare(
        self,
        modules: Sequence[nn.Module],
        head: Embedding | Linear | None,
        decoding: Collection[nn.Module] = (),
        *,
        draws: bool = True,
    ) -> None:
        """Lay the experts of a layer side by side, unless they are quantised."""
        routed = [m for m in modules if isinstance(getattr(m, "router", None), Router)]
        mixtures = [m.experts for m in routed if isinstance(m.experts, nn.ModuleList)]
        for mlps in mixtures:
            if all(type(layer) is Linear for mlp in mlps for layer in (mlp.gate_up, mlp.down)):
                self._stacked[mlps] = _stacked(mlps, "gate_up"), _stacked(mlps, "down")
        self.experts_wait = len(self._stacked) < len(mixtures)

    def experts(self, mlps: nn.ModuleList, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        if mlps not in self._stacked:
            return super().experts(mlps, x, chosen, shares)
        return experts.mix(x, chosen, shares, *self._stacked[mlps])

    def patches(
        self, tiles: Tensor, mean: Tensor, std: Tensor, side: int, dtype: torch.dtype
    ) -> Tensor:
        return pixels.patches(tiles, mean, std, side, dtype)

    def linear_gelu(self, layer: Linear, x: Activations) -> Tensor:
        return fused.bias_gelu_(_product(layer, x), layer.bias)

    def linear_gelu_for(self, layer: Linear, x: Activations, taker: Linear) -> Activations:
        if isinstance(taker, Fp8Linear):
            return quantize.bias_gelu(_product(layer, x), layer.bias)
        return self.linear_gelu(layer, x)

    def gate_up(self, layer: Linear, x: Activations) -> Tensor:
        return fused.silu_mul(self.linear(layer, x))

    def gate_up_for(self, layer: Linear, x: Activations, taker: Linear) -> Activations:
        if isinstance(taker, Fp8Linear):
            return quantize.silu_mul(self.linear(layer, x))
        return self.gate_up(layer, x)

    def norm(self, x: Tensor, norm: LayerNorm | RMSNorm) -> Tensor:
        return self.add_norm(x, None, norm)[1]

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm
    ) -> tuple[Tensor, Tensor]:
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        return fused.add_norm(hidden, delta, norm.weight, bias, norm.eps)

    def add_norm_for(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm, taker: Linear
    ) -> tuple[Tensor, Activations]:
        if not isinstance(taker, Fp8Linear):
            return self.add_norm(hidden, delta, norm)
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        return quantize.add_norm(hidden, delta, norm.weight, bias, norm.eps)


def _product(layer: Linear, x: Activations) -> Tensor:
    """A layer without its bias."""
    if isinstance(layer, Fp8Linear):
        return layer.multiply(x, None)
    assert isinstance(x, Tensor)  # noqa: S101 - for the type checker
    return functional.linear(x, layer.weight)


def _stacked(mlps: nn.ModuleList, name: str) -> Tensor:
    """``[E, outputs, inputs]``, of which the layers of that name then have their part."""
    layers = [getattr(mlp, name) for mlp in mlps]
    weights = torch.stack([layer.weight for layer in layers])
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return weights
