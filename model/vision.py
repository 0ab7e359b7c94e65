"""InternViT, both sizes: patches, class token, pre-norm blocks with LayerScale.

Called by ``InternVL.encode_tiles`` only. It knows tiles and nothing of pictures or prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import LayerNorm, Linear, RMSNorm, parameter
from model.schema import VisionConfig

_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class Patch(nn.Module):
    """Cuts ``[T, C, S, S]`` into non-overlapping patches: ``[T, patches, size]``, row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.weight = parameter(config.hidden_size, config.channels, side, side)
        self.bias = parameter(config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is a matrix product over unfolded patches.
        tiles, channels, height, width = pixels.shape
        side = self.weight.shape[-1]
        rows, columns = height // side, width // side
        patches = pixels.view(tiles, channels, rows, side, columns, side)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(tiles, rows * columns, -1)
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class VisionAttention(nn.Module):
    """Attention of every patch to every patch of its tile; QK-norm spans all heads at once."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.heads
        self.qkv = Linear(size, 3 * size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(size, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.eps) if config.qk_norm else None
        self.out = Linear(size, size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """One block ``[T, patches, size] -> same``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        norm = _NORMS[config.norm]
        self.norm1 = norm(size, config.eps)
        self.attention = VisionAttention(config)
        self.scale1 = parameter(size)
        self.norm2 = norm(size, config.eps)
        self.fc1 = Linear(size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, size, bias=True)
        self.scale2 = parameter(size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden)) * self.scale1
        inner = functional.gelu(self.fc1(self.norm2(hidden)))
        return hidden + self.fc2(inner) * self.scale2


class VisionModel(nn.Module):
    """Normalised pixels ``[T, 3, S, S]`` to patch features ``[T, patches, size]``, no class token.

    The stored position embedding belongs to ``config.grid``; ``fit`` must be called once after
    loading when tiles have another grid.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.class_embedding = parameter(1, 1, size)
        self.position_embedding = parameter(1, config.grid**2 + 1, size)
        self.patch = Patch(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.norm = LayerNorm(size, config.eps) if config.final_norm else None
        self._stored_grid = config.grid

    def fit(self, grid: int) -> None:
        """Resample the position embedding to ``grid`` patches per side, in fp32."""
        if grid == self._stored_grid:
            return
        stored = self.position_embedding
        side, size = self._stored_grid, stored.shape[-1]
        square = stored[:, 1:].float().view(1, side, side, size).permute(0, 3, 1, 2)
        square = functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
        patches = square.permute(0, 2, 3, 1).reshape(1, grid * grid, size).to(stored.dtype)
        fitted = torch.cat((stored[:, :1], patches), dim=1)
        self.position_embedding = nn.Parameter(fitted, requires_grad=False)
        self._stored_grid = grid

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch(pixels)
        first = self.class_embedding.expand(len(patches), -1, -1)
        hidden = torch.cat((first, patches), dim=1) + self.position_embedding
        for layer in self.layers:
            hidden = layer(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden[:, 1:]
