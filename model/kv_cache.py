"""The paged key-value cache: one tensor, a view per layer. It knows blocks, not sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.schema import TextConfig
from model.transfer import to_device


class KVCache:
    """``layers[i]`` is ``[blocks, 2, kv_heads, block_size, head_dim]``; index 1 is key, value."""

    def __init__(
        self,
        config: TextConfig,
        *,
        blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block_size = block_size
        self.dtype = dtype
        shape = (config.layers, blocks, 2, config.kv_heads, block_size, config.head_dim)
        # Not zeroed here: blocks are cleared when they get an owner, and untouched memory is free.
        self._data = torch.empty(shape, device=device, dtype=dtype)
        self.layers: tuple[Tensor, ...] = self._data.unbind(0)

    @staticmethod
    def block_bytes(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block in all layers."""
        values = config.layers * 2 * config.kv_heads * block_size * config.head_dim
        return values * dtype.itemsize

    def copy(self, source: int, target: int) -> None:
        """Make a block what another one is, whole: only attention knows the order inside."""
        if source != target:
            self._data[:, target] = self._data[:, source]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that get a new owner.

        Attention masks positions beyond a row's length, but a masked NaN is still a NaN: what a
        broken sequence left behind must not reach the next one.
        """
        index = to_device(blocks, self._data.device)
        self._data.index_fill_(1, index, 0)
