"""Rotary position embedding: angles once per step, applied in fp32 to queries and keys.

Positions may be fractional; they are fp32 all the way, because bf16 loses whole positions above
256. The angles of a step are shared by all layers; only ``model.single`` keeps a table of them.
"""

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """``[head_dim / 2]``, fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


def angles(positions: Tensor, frequencies: Tensor) -> Angles:
    """Cosine and sine, each ``[N, 1, head_dim / 2]`` fp32, for positions ``[N]``."""
    turns = positions.view(-1, 1, 1) * frequencies
    return turns.cos(), turns.sin()


def rotate(heads: Tensor, at: Angles) -> Tensor:
    """Turn ``[N, heads, head_dim]`` by its positions' angles; halves are paired (NeoX style)."""
    cosine, sine = at
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(heads.dtype)
