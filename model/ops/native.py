"""The operations on the CPU in bf16, by this project's own C (model/native).

With "int8" all products, that of the head too, are in whole numbers: weights with a scale per
output, and activations, as they come, with one per row.

Weights are packed once, in the order in which the products read them, and take the place of those
that were loaded. With AVX512-BF16 the decoder's weights are kept in twelve bits, which say the
same (wide.c): a step of few tokens takes as long as reading them. There the head is kept once more
in six bits, to know for a greedy draw which of its outputs need not be computed (draw.c).

Every row of a result depends on its own input alone: not on the rows computed beside it, nor on how
many there are.
"""

import ctypes
import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from model.layers import Activations, Embedding, LayerNorm, Linear, RMSNorm, Router
from model.native import LANES, LIBRARY, NARROW, STEP, STEP8, Heads, Matrix, Sketch
from model.ops.base import Ops

_PLAIN, _GELU, _GATE, _FLOATS = range(4)
# Rows of an activation lie so many elements further apart than they are long: at distances that
# are powers of two they would fight for the same lines of the first cache.
_GAP = 32
# Weights are packed into pieces of memory of at least so many bytes: large pages are 2 MiB.
_ARENA = 64 << 20
# One weight in so many may be odd, each an addition more; of random ones one in 15,000 is.
_ODD = 500


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A matrix in panels, and the memory that it names."""

    matrix: Matrix
    memory: list[object]


class NativeOps(Ops):
    """See the module. Layers whose shape the C cannot compute stay with torch."""

    name = "native"

    def __init__(self, quantization: str = "none", *, narrow: bool = NARROW) -> None:
        self._int8 = quantization == "int8"
        self._narrows = narrow
        self._packed: dict[nn.Module, _Packed] = {}
        self._norms: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._arena = scratch(0)
        # Taking memory anew for every result costs as much as filling it. A result is there until
        # the third after it is made; ``keep`` copies what somebody else may hold longer.
        self._results = [scratch(0) for _ in range(3)]
        self._inner, self._panels = scratch(0), scratch(0)
        self._floats = torch.empty(0)
        self._scratch = scratch(0)

    @staticmethod
    def missing(device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or why this cannot be used there."""
        if device.type != "cpu":
            return "it computes on the CPU"
        if dtype != torch.bfloat16:
            return "it computes in bfloat16"
        return (
            None if LIBRARY else "it was not compiled when this version of the server was installed"
        )

    def prepare(
        self,
        modules: Sequence[nn.Module],
        head: Embedding | Linear | None,
        decoding: Collection[nn.Module] = (),
        *,
        draws: bool = True,
    ) -> None:
        # Two pools of threads would take the cores from each other: what torch still does is small.
        LIBRARY.internvl_threads(torch.get_num_threads())
        torch.set_num_threads(1)
        gates = {module.gate_up for module in modules if hasattr(module, "gate_up")}
        for module in modules:
            if isinstance(module, Linear):
                # Quantised ones compute by themselves.
                plain = module.weight.dtype == torch.bfloat16
                gated = module in gates
                outputs, inputs = module.weight.shape
                # Gates stand in panels of their own, beside those they belong to.
                if plain and inputs % STEP == 0 and not (gated and outputs % (2 * LANES)):
                    self._pack(
                        module,
                        module.bias,
                        gates=gated,
                        decoding=module in decoding,
                        draws=draws and module is head,
                    )
                    del module.weight
            elif isinstance(module, LayerNorm | RMSNorm) and len(module.weight) % LANES == 0:
                bias = module.bias.float() if isinstance(module, LayerNorm) else None
                self._norms[module] = module.weight.float(), bias
        if isinstance(head, Embedding) and head.weight.shape[1] % STEP == 0:
            self._pack(head, None, gates=False, decoding=True, draws=draws)

    def tiles_at_once(self, device: torch.device) -> int:
        return 1  # the rows of one fill the cores, and more leave the caches

    def _pack(
        self,
        layer: Linear | Embedding,
        bias: Tensor | None,
        *,
        gates: bool,
        decoding: bool,
        draws: bool = False,
    ) -> None:
        weight = layer.weight
        outputs, inputs = weight.shape
        panels = -(-outputs // LANES)
        shape = weight.data_ptr(), outputs, inputs
        first = outputs // 2 if gates else 0
        memory: dict[str, Tensor] = {}
        if bias is not None:
            memory["bias"] = bias.float()
        if self._int8 and inputs % STEP8 == 0 and not isinstance(layer, Router):
            memory |= self._whole(shape, panels, first)
        elif decoding and self._narrows and (narrow := self._narrow(shape, panels, first)):
            memory |= narrow
        else:
            memory["panels"] = self._take(panels * LANES * inputs)
            LIBRARY.internvl_pack(*shape, memory["panels"].data_ptr(), first)
        named = {name: part.data_ptr() for name, part in memory.items()}
        matrix = Matrix(**named, inputs=inputs, outputs=outputs)
        kept: list[object] = [*memory.values()]
        if draws and self._narrows and inputs % STEP8 == 0:
            sketch, behind = self._sketch(shape, panels, matrix if matrix.scales else None)
            matrix.sketch = ctypes.addressof(sketch)
            kept += [sketch, behind]
        self._packed[layer] = _Packed(matrix, kept)

    def _whole(self, shape: tuple[int, int, int], panels: int, gates: int) -> dict[str, Tensor]:
        """A matrix in eight bits."""
        _, _, inputs = shape
        # The C reads both panels of a group, also where there is one.
        memory = {
            "panels": self._take(panels * LANES * inputs // 2),
            "scales": torch.zeros((panels + 1) * LANES),
            "sums": torch.zeros((panels + 1) * LANES, dtype=torch.int32),
        }
        LIBRARY.internvl_pack8(*shape, *(part.data_ptr() for part in memory.values()), gates)
        return memory

    def _narrow(self, shape: tuple[int, int, int], panels: int, gates: int) -> dict[str, Tensor]:
        """A matrix in twelve bits; nothing where these cannot say too many of its weights."""
        _, outputs, inputs = shape
        bases = torch.empty(panels + 1, dtype=torch.uint8)
        starts = torch.empty(panels + 1, dtype=torch.int32)
        found = LIBRARY.internvl_odds(*shape, gates, bases.data_ptr(), starts.data_ptr())
        if found > outputs * inputs // _ODD:
            return {}
        memory = {
            "bases": bases,
            "odd_starts": starts,
            "odds": torch.empty(found + 1, dtype=torch.int64),
            "panels": self._take((panels + panels % 2) * LANES * inputs * 3 // 4),
        }
        LIBRARY.internvl_pack12(*shape, gates, *(part.data_ptr() for part in memory.values()))
        return memory

    def _sketch(
        self, shape: tuple[int, int, int], panels: int, packed: Matrix | None
    ) -> tuple[Sketch, list[Tensor]]:
        """A head in six bits, and how far it is from what it was, in eight if ``packed``."""
        _, outputs, inputs = shape
        memory = self._take(panels * LANES * inputs * 3 // 8)
        # The C reads both panels of a group, also where there is one.
        scales, doubts = torch.zeros(2, (panels + 1) * LANES)
        parts = (part.data_ptr() for part in (memory, scales, doubts))
        LIBRARY.internvl_pack6(*shape, packed, *parts)
        whole = Matrix(memory.data_ptr(), scales.data_ptr(), inputs=inputs, outputs=outputs)
        return Sketch(whole, doubts.data_ptr(), 0), [memory, scales, doubts]

    def matrix(self, layer: nn.Module) -> Matrix | None:
        """A layer in panels, if it was packed; there as long as these operations."""
        packed = self._packed.get(layer)
        return None if packed is None else packed.matrix

    def weight(self, norm: nn.Module) -> Tensor | None:
        """The fp32 weight of a norm that has no bias, if the C computes it; likewise."""
        weight, bias = self._norms.get(norm, (None, None))
        return None if bias is not None else weight

    def _take(self, count: int) -> Tensor:
        """Memory for ``count`` weights of two bytes, of pages that are read fast."""
        if len(self._arena) < count:
            self._arena = scratch(max(count, _ARENA // 2))
        taken, self._arena = self._arena[:count], self._arena[count:]
        return taken

    def linear(self, layer: Linear, x: Activations) -> Tensor:
        packed = self._packed.get(layer)
        if packed is None or not isinstance(x, Tensor):
            return super().linear(layer, x)
        return self._product(
            packed, x, _PLAIN, self._rows(x.numel() // packed.matrix.inputs, packed.matrix.outputs)
        )

    def linear_gelu(self, layer: Linear, x: Activations) -> Tensor:
        packed = self._packed.get(layer)
        if packed is None or not isinstance(x, Tensor):
            return super().linear_gelu(layer, x)
        return self._product(
            packed, x, _GELU, self._wide(x.numel() // packed.matrix.inputs, packed.matrix.outputs)
        )

    def gate_up(self, layer: Linear, x: Activations) -> Tensor:
        packed = self._packed.get(layer)
        if packed is None or not isinstance(x, Tensor):
            return super().gate_up(layer, x)
        return self._product(packed, x, _GATE, self._wide(len(x), packed.matrix.outputs // 2))

    def logits(self, layer: Embedding | Linear, hidden: Tensor) -> Tensor:
        packed = self._packed.get(layer)
        if packed is None:
            return super().logits(layer, hidden)
        if len(self._floats) < len(hidden):
            self._floats = torch.empty(len(hidden), packed.matrix.outputs)
        return self._product(packed, hidden, _FLOATS, self._floats[: len(hidden)])

    def draw(self, layer: Embedding | Linear, hidden: Tensor) -> Tensor | None:
        packed = self._packed.get(layer)
        if packed is None:
            return None
        rows = len(hidden)
        tokens = torch.empty(rows, dtype=torch.int64)
        needed = LIBRARY.internvl_draw_scratch(packed.matrix, rows)
        self._scratch = grown(self._scratch, -(-needed // 2))
        LIBRARY.internvl_draw(
            packed.matrix,
            hidden.data_ptr(),
            hidden.stride(0),
            rows,
            tokens.data_ptr(),
            self._scratch.data_ptr(),
        )
        return tokens

    def _product(self, packed: _Packed, x: Tensor, kind: int, y: Tensor) -> Tensor:
        flat = x.reshape(-1, packed.matrix.inputs)
        matrix, rows = packed.matrix, len(flat)
        self._scratch = grown(self._scratch, LIBRARY.internvl_linear_scratch(matrix, rows) // 2)
        LIBRARY.internvl_linear(
            matrix,
            flat.data_ptr(),
            flat.stride(0),
            rows,
            y.data_ptr(),
            y.stride(0),
            kind,
            self._scratch.data_ptr(),
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _rows(self, rows: int, columns: int) -> Tensor:
        """Memory for a result ``[rows, columns]``."""
        self._results.append(grown(self._results.pop(0), rows * (columns + _GAP)))
        return _view(self._results[-1], rows, columns)

    def _wide(self, rows: int, columns: int) -> Tensor:
        """Likewise, for what is read by the next product only."""
        self._inner = grown(self._inner, rows * (columns + _GAP))
        return _view(self._inner, rows, columns)

    def keep(self, x: Tensor) -> Tensor:
        return x.clone()

    def norm(self, x: Tensor, norm: LayerNorm | RMSNorm) -> Tensor:
        return self._add_norm(x, None, norm)

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm
    ) -> tuple[Tensor, Tensor]:
        if norm not in self._norms:
            return super().add_norm(hidden, delta, norm)
        return hidden, self._add_norm(hidden, delta, norm)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, norm: LayerNorm | RMSNorm) -> Tensor:
        if norm not in self._norms:
            return super().norm(hidden, norm)
        weight, bias = self._norms[norm]
        size = len(weight)
        x = hidden.view(-1, size)
        added = None if delta is None else delta.view(-1, size)
        out = self._rows(len(x), size)
        LIBRARY.internvl_add_norm(
            x.data_ptr(),
            x.stride(0),
            None if added is None else added.data_ptr(),
            0 if added is None else added.stride(0),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            len(x),
            size,
            norm.eps,
            bias is not None,
        )
        return out.view(hidden.shape)

    def head_norms(
        self, qkv: Tensor, counts: Sequence[int], q_norm: RMSNorm, k_norm: RMSNorm
    ) -> Tensor:
        query, key = self.weight(q_norm), self.weight(k_norm)
        if query is None or key is None:
            return super().head_norms(qkv, counts, q_norm, k_norm)
        LIBRARY.internvl_head_norms(
            Heads(counts[0], counts[1], len(query), 0),
            qkv.data_ptr(),
            qkv.stride(0),
            len(qkv),
            query.data_ptr(),
            key.data_ptr(),
            q_norm.eps,
        )
        return qkv

    def vision_attention(
        self, qkv: Tensor, heads: int, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        tiles, patches, width = qkv.shape
        size = width // 3
        head = size // heads
        if head % STEP or head > 256 or (q_norm is not None and q_norm not in self._norms):
            return super().vision_attention(qkv, heads, q_norm, k_norm)
        if q_norm is not None and k_norm is not None:
            qkv = torch.cat(
                (
                    self.norm(qkv[..., :size], q_norm),
                    self.norm(qkv[..., size : 2 * size], k_norm),
                    qkv[..., 2 * size :],
                ),
                dim=-1,
            )
        mixed = self._rows(tiles * patches, size)
        needed = LIBRARY.internvl_tile_scratch(tiles, patches, heads, head)
        self._panels = grown(self._panels, needed)
        LIBRARY.internvl_tile_attention(
            qkv.data_ptr(),
            qkv.stride(1),
            tiles,
            patches,
            heads,
            head,
            self._panels.data_ptr(),
            mixed.data_ptr(),
            mixed.stride(0),
        )
        return mixed.view(tiles, patches, size)


def scratch(count: int) -> Tensor:
    """Room for ``count`` numbers, in pages that are read fast."""
    taken = torch.empty(count, dtype=torch.bfloat16)
    LIBRARY.internvl_large_pages(taken.data_ptr(), taken.nbytes)
    return taken


def grown(memory: Tensor, count: int) -> Tensor:
    return memory if len(memory) >= count else scratch(count)


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * (columns + _GAP)].view(rows, columns + _GAP)[:, :columns]
