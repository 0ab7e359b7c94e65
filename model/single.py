"""Steps of one new token per row on the CPU: from ids to hidden states in one call of the C.

After every step the weights have taken the place of everything else in the caches, so that each
operation in front of the layers takes as long as if it were called for the first time.
"""

import ctypes
from array import array

import torch
from torch import Tensor

from model.attention.base import AttentionBackend
from model.attention.native import NativeAttention
from model.internvl import InternVL
from model.kv_cache import KVCache
from model.native import LIBRARY, Layers, Single
from model.ops.native import scratch
from model.rotary import angles, inverse_frequencies


class SingleTokens:
    """Through ``layers``. ``tables`` [lines, blocks] and ``last`` [lines], int64, are looked up by
    a row's line at each call; there are no more rows than lines."""

    def __init__(
        self,
        model: InternVL,
        block_size: int,
        layers: Layers,
        tables: Tensor,
        last: Tensor,
    ) -> None:
        text, (most, width) = model.text, tables.shape
        embedding = model.decoder.embedding.weight
        # To the bit what a step computes for its own positions.
        frequencies = inverse_frequencies(text.head_dim, text.rope_theta, model.device)
        cosine, sine = angles(torch.arange(width * block_size), frequencies)
        self._single = Single(
            layers=ctypes.pointer(layers),
            embedding=embedding.data_ptr(),
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            tables=tables.data_ptr(),
            last=last.data_ptr(),
            hidden=text.hidden_size,
            width=width,
            heads=layers.heads,
        )
        needed = LIBRARY.internvl_single_scratch(self._single, most)
        hidden = torch.empty(most, text.hidden_size, dtype=torch.bfloat16)
        self._scratch = scratch(-(-needed // 2))
        self._memory = layers, embedding, cosine, sine, tables, last
        self._hidden = [hidden[:rows] for rows in range(most + 1)]
        self._pointers = hidden.data_ptr(), self._scratch.data_ptr()

    def __call__(self, inputs: "array[int]") -> Tensor:
        """``engine.rows.Rows.decode_inputs`` of the rows to hidden states ``[rows, hidden]``, there
        until the next call."""
        rows = len(inputs) // 4
        LIBRARY.internvl_single(self._single, inputs.buffer_info()[0], rows, *self._pointers)
        return self._hidden[rows]


def single_tokens(
    model: InternVL,
    kv: KVCache,
    attention: AttentionBackend,
    tables: Tensor,
    last: Tensor,
) -> SingleTokens | None:
    """None where such steps are computed like all others."""
    if not (isinstance(attention, NativeAttention) and model.group.is_alone):
        return None
    decoder = model.decoder
    layers = attention.layers(decoder.layers, decoder.norm, kv, model.ops)
    if layers is None or not decoder.embedding.weight.is_contiguous():
        return None
    return SingleTokens(model, kv.block_size, layers, tables, last)
