"""Steps of one new token per row on the CPU: from ids to hidden states, or to the likeliest tokens,
in one call of the C.

After every step the weights have taken the place of everything else in the caches, so that each
operation beside the layers takes as long as if it were called for the first time.
"""

import ctypes
from array import array

import torch
from torch import Tensor

from model.attention.base import AttentionBackend
from model.attention.native import NativeAttention
from model.internvl import InternVL
from model.kv_cache import KVCache
from model.native import LIBRARY, Layers, Matrix, Single
from model.ops.native import NativeOps, scratch
from model.rotary import angles, inverse_frequencies


class SingleTokens:
    """Through ``layers`` and ``head``. ``tables`` [lines, blocks] and ``last`` [lines], int64, are
    looked up by a row's line at each call. A call is made with ``engine.rows.Rows.decode_inputs``
    of the rows. Raises ValueError for more rows than lines, as memory is set aside for so many."""

    def __init__(
        self,
        model: InternVL,
        block_size: int,
        layers: Layers,
        head: Matrix,
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
            head=ctypes.pointer(head),
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

    def hidden(self, inputs: "array[int]") -> Tensor:
        """Hidden states ``[rows, hidden]``, there until the next call."""
        self._call(inputs, None)
        return self._hidden[len(inputs) // 4]

    def draw(self, inputs: "array[int]") -> Tensor:
        """What ``engine.sampling.sampler.sample_plain`` draws from the hidden states' logits, which
        are not written: int64 ``[rows]``. ``last`` has it then."""
        tokens = torch.empty(len(inputs) // 4, dtype=torch.int64)
        self._call(inputs, tokens.data_ptr())
        return tokens

    def _call(self, inputs: "array[int]", tokens: int | None) -> None:
        (address, count), (hidden, memory) = inputs.buffer_info(), self._pointers
        rows = count // 4
        if rows >= len(self._hidden):
            raise ValueError(f"{rows} rows are more than there are lines")
        LIBRARY.internvl_single(self._single, address, rows, hidden, tokens, memory)


def single_tokens(
    model: InternVL,
    kv: KVCache,
    attention: AttentionBackend,
    tables: Tensor,
    last: Tensor,
) -> SingleTokens | None:
    """None where such steps are computed like all others."""
    decoder, ops = model.decoder, model.ops
    if not (
        isinstance(attention, NativeAttention)
        and isinstance(ops, NativeOps)
        and model.group.is_alone
        and decoder.embedding.weight.is_contiguous()
    ):
        return None
    layers = attention.layers(decoder.layers, decoder.norm, kv, ops)
    head = ops.matrix(decoder.output)
    if layers is None or head is None:
        return None
    return SingleTokens(model, kv.block_size, layers, head, tables, last)
