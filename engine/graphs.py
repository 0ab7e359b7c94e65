"""Work of a few sizes, captured once and replayed: launching it then costs the host one call.

A graph reads and writes the same memory every time, so what goes in and out lies in tensors that
stay. A batch of another size is padded to the next or computed without a graph. Larger graphs are
captured first, because smaller ones then fit into the memory that those leave.
"""

import bisect
import functools
from array import array
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.rows import DeviceRows
from engine.sampling.sampler import sample_plain
from model import InternVL
from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.transfer import overwrite

_ROWS = (1, 2, 4, 8, 12, 16, 24, *range(32, 128, 16), *range(128, 256, 32), *range(256, 513, 64))
# What pictures are cut into, and a full pass of the encoder.
_TILES = (1, 2, 3, 4, 5, 7, 9, 13, 16)
# Tiles that are only padding cost more than launching does, unless they are few among many.
_PADDED_TILES = 1 / 8


class Capture(Protocol):
    """Runs a function that works on tensors that stay, and returns what does the same again."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """``function`` must neither wait for the device nor read memory of the host."""


class CudaCapture:
    """Captures CUDA graphs that share their memory, so that no two may be under way at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        # What is set up at first use, such as a library's workspace, must not be captured.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that looks at its events meanwhile, which must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


def capture_on(device: torch.device) -> Capture | None:
    """None where there are no graphs."""
    return CudaCapture() if device.type == "cuda" else None


def row_sizes(most: int) -> list[int]:
    """The batches that decode graphs are made for, where a step has at most so many rows."""
    return [*(size for size in _ROWS if size < most), min(most, _ROWS[-1])]


def tile_sizes(most: int) -> list[int]:
    """The same for a pass of the encoder."""
    return [*(size for size in _TILES if size < most), min(most, _TILES[-1])]


class DecodeGraph:
    """A batch of ``size`` rows with one new token each; some may be padding."""

    def __init__(self, size: int, graphs: "DecodeGraphs", capture: Capture) -> None:
        self.size = size
        device = graphs.logits.device
        self._graphs = graphs
        # As ``Rows.decode_inputs`` has them; at first all are padding.
        self._inputs = torch.zeros(4, size, dtype=torch.int32, device=device)
        self._inputs[0] = graphs.rows.padding
        # Two numbers of a draw's key, and the bits of its temperature; see ``sample``.
        self._draws = torch.zeros(3, size, dtype=torch.int32, device=device)
        self._starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._forward = capture(self._compute)
        self._greedy = capture(lambda: self._sample(None))
        self._drawn = capture(lambda: self._sample(self._draws))

    def _compute(self) -> None:
        graphs, rows = self._graphs, self._graphs.rows
        block_size, tables = graphs.kv.block_size, rows.tables
        lines, ids, lengths = self._inputs[0].long(), self._inputs[1].long(), self._inputs[2]
        ids = torch.where(ids < 0, rows.last[lines], ids)
        places = (lengths - 1).clamp(min=0).long()
        table = tables[lines]
        block = table.gather(1, places[:, None] // block_size)[:, 0]
        slots = torch.where(lengths > 0, block * block_size + places % block_size, -1)
        batch = AttentionBatch(
            query_starts=self._starts,
            context_lengths=lengths,
            slots=slots,
            block_tables=table,
            queries=(1,) * self.size,
            contexts=(tables.shape[1] * block_size,) * self.size,
        )
        model = graphs.model
        positions = places - self._inputs[3]
        hidden = model(model.embed(ids), positions, batch, graphs.kv, graphs.attention)
        graphs.logits[: self.size].copy_(model.logits(hidden))

    def _sample(self, draws: Tensor | None) -> None:
        graphs = self._graphs
        tokens = sample_plain(graphs.logits[: self.size], draws)
        graphs.tokens[: self.size] = tokens
        graphs.rows.last[self._inputs[0].long()] = tokens.clamp(min=0)

    def forward(self, inputs: "array[int]") -> Tensor:
        """``Rows.decode_inputs`` to logits [size, V], which stay until the next step's."""
        overwrite(self._inputs, np.frombuffer(inputs, dtype=np.int32).reshape(4, self.size))
        self._forward()
        return self._graphs.logits[: self.size]

    def sample(self, draws: np.ndarray | None) -> Tensor:
        """The tokens of the rows of ``forward``, int64 [size], which stay as long.

        They are noted as the rows' last ones. Rows are greedy without ``draws``, which are as in
        ``sampler.sample_plain``.
        """
        if draws is None:
            self._greedy()
        else:
            overwrite(self._draws, draws)
            self._drawn()
        return self._graphs.tokens[: self.size]


class DecodeGraphs:
    """Steps in which every row has one new token, for at most ``most`` rows.

    Each size has a graph from tokens to logits and two from logits to tokens, as grammars and
    penalties come between. ``attention`` must be graph-safe.
    """

    def __init__(
        self,
        model: InternVL,
        kv: KVCache,
        attention: AttentionBackend,
        rows: DeviceRows,
        sizes: list[int],
        capture: Capture,
    ) -> None:
        self.model, self.kv, self.attention, self.rows = model, kv, attention, rows
        largest, device = max(sizes), model.device
        self.logits = torch.zeros(largest, model.config.text.vocab_size, device=device)
        self.tokens = torch.zeros(largest, dtype=torch.long, device=device)
        self._sizes = sorted(sizes)
        self._graphs = {size: DecodeGraph(size, self, capture) for size in reversed(self._sizes)}

    def pick(self, rows: int) -> DecodeGraph | None:
        """The least graph that so many rows fit in; None if there are too many."""
        at = bisect.bisect_left(self._sizes, rows)
        return self._graphs[self._sizes[at]] if at < len(self._sizes) else None


class TileGraphs:
    """The encoder: tiles uint8 ``[T, 3, side, side]`` on the device to ``[T, tokens, hidden]``."""

    def __init__(self, model: InternVL, sizes: list[int], capture: Capture) -> None:
        self._model = model
        self._sizes = sorted(sizes)
        geometry, hidden = model.config.geometry, model.config.text.hidden_size
        largest, side, tokens = max(sizes), geometry.tile_size, geometry.tokens_per_tile
        device = model.device
        self._tiles = torch.zeros(largest, 3, side, side, dtype=torch.uint8, device=device)
        self._encoded = torch.zeros(largest, tokens, hidden, dtype=model.dtype, device=device)
        self._replays = {
            size: capture(functools.partial(self._encode, size)) for size in reversed(self._sizes)
        }

    def _encode(self, size: int) -> None:
        self._encoded[:size] = self._model.encode_tiles(self._tiles[:size])

    def pick(self, tiles: int) -> int | None:
        """The size to encode so many tiles in; None if none fits them well enough."""
        at = bisect.bisect_left(self._sizes, tiles)
        if at == len(self._sizes) or self._sizes[at] * (1 - _PADDED_TILES) > tiles:
            return None
        return self._sizes[at]

    def __call__(self, tiles: Tensor) -> Tensor:
        """Encode tiles, by a graph if there is one."""
        size = self.pick(len(tiles))
        if size is None:
            return self._model.encode_tiles(tiles)
        self._tiles[: len(tiles)] = tiles
        self._replays[size]()
        return self._encoded[: len(tiles)].clone()
