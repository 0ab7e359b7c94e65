"""Pixel shuffle and the MLP that turns patch features into token embeddings."""

from torch import Tensor, nn

from model.layers import LayerNorm, Linear
from model.ops import Ops
from model.schema import ProjectorConfig


def pixel_shuffle(patches: Tensor, factor: int, version: str) -> Tensor:
    """Fold ``factor`` x ``factor`` neighbours into channels.

    ``[T, side * side, size] -> [T, (side / factor) ** 2, size * factor ** 2]``; within a token
    the neighbours stand row by row. "v1" puts the tokens in column order, as early checkpoints
    were trained.
    """
    tiles, count, size = patches.shape
    side = round(count**0.5)
    grid = patches.view(tiles, side // factor, factor, side // factor, factor, size)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return grid.permute(order).reshape(tiles, count // factor**2, size * factor**2)


class Projector(nn.Module):
    """Patch features ``[T, side * side, vision size] -> [T, tokens, decoder size]``."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self._config = config
        self.norm = LayerNorm(config.input_size, config.eps)
        self.first = Linear(config.input_size, config.hidden_size, bias=True)
        self.second = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, patches: Tensor, ops: Ops) -> Tensor:
        tokens = pixel_shuffle(patches, self._config.factor, self._config.version)
        inner = ops.linear_gelu_for(self.first, ops.norm(tokens, self.norm), self.second)
        return ops.linear(self.second, inner)
