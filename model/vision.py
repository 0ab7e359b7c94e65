"""InternViT, both sizes: patches, class token, pre-norm blocks with LayerScale.

Called by ``InternVL.encode_tiles`` only. It knows tiles and nothing of pictures or prompts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers import Activations, LayerNorm, Linear, RMSNorm, parameter
from model.ops import Ops
from model.schema import VisionConfig

_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class Patch(nn.Module):
    """The embedding of patches, ``[T, patches, channels * side ** 2] -> [T, patches, size]``.

    A convolution whose stride is its kernel is a matrix product over the patches.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.weight = parameter(config.hidden_size, config.channels, side, side)
        self.bias = parameter(config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
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

    def forward(self, normed: Activations, ops: Ops) -> Tensor:
        qkv = ops.linear(self.qkv, normed)
        mixed = ops.vision_attention(qkv, self.heads, self.q_norm, self.k_norm)
        return ops.linear(self.out, mixed)


class VisionLayer(nn.Module):
    """One block. Its last sum is left to the next norm, which computes both at once.

    The scales (LayerScale) exist until ``fold``, for the loader.
    """

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

    def fold(self) -> None:
        """Multiply the scales into the layers they follow."""
        for scale, layer in ((self.scale1, self.attention.out), (self.scale2, self.fc2)):
            for part in layer.parameters():
                part.mul_(scale.view(-1, *[1] * (part.dim() - 1)))
        del self.scale1, self.scale2

    def forward(self, hidden: Tensor, delta: Tensor | None, ops: Ops) -> tuple[Tensor, Tensor]:
        """Hidden states ``[T, patches, size]`` and what is to be added to them, in and out."""
        hidden, normed = ops.add_norm_for(hidden, delta, self.norm1, self.attention.qkv)
        delta = self.attention(normed, ops)
        hidden, normed = ops.add_norm_for(hidden, delta, self.norm2, self.fc1)
        return hidden, ops.linear(self.fc2, ops.linear_gelu_for(self.fc1, normed, self.fc2))


class VisionModel(nn.Module):
    """Patches, as ``Ops.patches`` cuts them, to their features ``[T, patches, size]``, without the
    class token's.

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

    def fold(self) -> None:
        """Multiply every LayerScale into its layer; must be called once after loading."""
        for layer in self.layers:
            assert isinstance(layer, VisionLayer)  # noqa: S101 - for the type checker
            layer.fold()

    def forward(self, patches: Tensor, ops: Ops) -> Tensor:
        embedded = self.patch(patches)
        first = self.class_embedding.expand(len(embedded), -1, -1)
        hidden = torch.cat((first, embedded), dim=1) + self.position_embedding
        delta = None
        for layer in self.layers:
            hidden, delta = layer(hidden, delta, ops)
        if self.norm is not None:
            return ops.add_norm(hidden, delta, self.norm)[1][:, 1:]
        return hidden[:, 1:] if delta is None else (hidden + delta)[:, 1:]
