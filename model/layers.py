"""The small layers everything else is built from: linear, norms. Weights come from the loader.

Parameters are created on the meta device by whoever builds the skeleton, and never initialised
here: a layer that the loader did not fill must not exist.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional


def parameter(*shape: int) -> nn.Parameter:
    """An empty parameter that takes no gradient."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


# In eight bits the largest of a row counts as this at least: a row of zeros has a scale too.
LEAST = 1e-12


class Rounded(NamedTuple):
    """``[*lead, size]`` of ``dtype``, as a layer in float8 takes it: ``rows`` ``[N, size]`` in
    float8, and a ``scale`` for each, ``[N, 1]`` fp32."""

    rows: Tensor
    scale: Tensor
    lead: torch.Size
    dtype: torch.dtype


Activations: TypeAlias = Tensor | Rounded


class Linear(nn.Module):
    """``[..., inputs] -> [..., outputs]``, computed by ``Ops``; loaded as ``[outputs, inputs]``."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Router(Linear):
    """A linear layer that stays in its type when others are quantised: it only makes choices."""


class Embedding(nn.Module):
    """Rows of ``size`` numbers, one per id."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(count, size)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(hidden.dtype) * self.weight


class LayerNorm(nn.Module):
    """Affine layer norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (len(self.weight),), self.weight, self.bias, self.eps)
