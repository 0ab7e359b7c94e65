"""Checkpoints whose decoder is stored in four bits by AWQ, as LMDeploy's ``auto_awq`` writes them.
What is stored is either given to the loader as the weights that it stands for, so that the rest
sees an ordinary checkpoint, or kept in four bits (``Int4Linear``).

A linear layer of ``inputs`` and ``outputs`` is three tensors: ``qweight`` int32 [inputs,
outputs / 8], ``qzeros`` int32 [inputs / group, outputs / 8] and ``scales`` [inputs / group,
outputs]; weight = (q - zero) * scale, with unsigned q and zero. Eight numbers share a word.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import triton as kernels
from model.layers import Linear, Router
from model.schema import AwqConfig, CheckpointError, Section

BITS = 4
PARTS = ("qweight", "qzeros", "scales")
INTEGERS = (".qweight", ".qzeros")
# The columns, of the eight of a word, that stand in the lower and the upper halves of its bytes.
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]
# Weights that are expanded at once where no kernel multiplies four bits.
_AT_ONCE = 1 << 22


def read(section: Section) -> AwqConfig:
    """A quantization_config. Raises CheckpointError for other methods and forms."""
    section.choice("quant_method", "", ("awq",))
    section.choice("version", "gemm", ("gemm",))
    if section.integer("bits") != BITS:
        raise section.error("bits", f"is {section.values['bits']}; supported: {BITS}")
    if not section.flag("zero_point", True):
        raise section.error("zero_point", "false is not supported")
    return AwqConfig(section.integer("group_size"))


def joined(shapes: Mapping[str, tuple[int, ...]], config: AwqConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the stored ones stand for, by key.

    Raises CheckpointError where the parts of a layer do not belong together.
    """
    found = dict(shapes)
    for key, shape in shapes.items():
        if not key.endswith(".qweight"):
            continue
        layer = key.removesuffix(".qweight")
        parts = [found.pop(f"{layer}.{part}", ()) for part in PARTS]
        inputs, words = shape if len(shape) == 2 else (0, 0)
        groups, outputs = inputs // config.group, words * 8
        expected = [(groups * config.group, words), (groups, words), (groups, outputs)]
        if parts != expected:
            raise CheckpointError(
                f"{layer}: its {', '.join(PARTS)} are {', '.join(str(list(p)) for p in parts)}; "
                f"that is no layer with groups of {config.group}"
            )
        found[f"{layer}.weight"] = (outputs, inputs)
    return found


@dataclasses.dataclass(frozen=True)
class FourBits:
    """A layer's weight: ``numbers`` uint8 [outputs, inputs] from 0 to 15, ``zeros`` uint8 and
    ``scales`` [outputs, inputs / group]."""

    numbers: Tensor
    zeros: Tensor
    scales: Tensor

    def __getitem__(self, source: tuple[slice, ...]) -> "FourBits":
        """Some rows, and of these columns from group to group."""
        rows, *columns = source
        if not columns:
            return FourBits(self.numbers[rows], self.zeros[rows], self.scales[rows])
        group = self.numbers.shape[1] // self.zeros.shape[1]
        groups = slice(columns[0].start // group, columns[0].stop // group)
        return FourBits(
            self.numbers[rows, columns[0]], self.zeros[rows, groups], self.scales[rows, groups]
        )

    def dequantized(self) -> Tensor:
        """fp32 [outputs, inputs]: exact, and rounded once later."""
        return _weight(self.numbers, self.zeros, self.scales.float())


def four_bits(parts: Iterable[Tensor]) -> FourBits:
    """What ``PARTS`` of a layer hold."""
    qweight, qzeros, scales = parts
    return FourBits(_unpacked(qweight).T, _unpacked(qzeros).T, scales.T)


def _unpacked(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] to numbers from 0 to 15, uint8 [rows, columns]."""
    stored = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    found[..., _LOW] = stored & 15
    found[..., _HIGH] = stored >> BITS
    return found.flatten(1)


def _weight(numbers: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """As in ``FourBits``, with scales in fp32, to fp32 [outputs, inputs]."""
    groups = numbers.view(torch.int8).unflatten(1, (zeros.shape[1], -1))
    return ((groups - zeros.view(torch.int8)[..., None]) * scales[..., None]).flatten(1)


class Int4Linear(Linear):
    """In the place of a linear layer, and filled by the loader like one, with what is stored.

    ``weight`` uint8 [outputs, inputs / 2] has the first half of each group in the lower bits and
    the second in the upper ones: a kernel then reads its inputs in order. ``zero`` is uint8 and
    ``scale`` fp32, [outputs, inputs / group]. What is multiplied with are the weights that they
    stand for, rounded to the type of ``x`` as the loader rounds them where they are not kept.
    """

    TYPES: ClassVar = {"weight": torch.uint8, "zero": torch.uint8, "scale": torch.float32}
    zero: nn.Parameter
    scale: nn.Parameter

    def __init__(self, layer: Linear, group: int) -> None:
        nn.Module.__init__(self)
        outputs, inputs = layer.weight.shape
        shapes = (inputs // 2, inputs // group, inputs // group)
        for (name, dtype), columns in zip(self.TYPES.items(), shapes, strict=True):
            empty = torch.empty(outputs, columns, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = layer.bias
        self._group = group

    def packed(self, part: FourBits) -> dict[str, Tensor]:
        """Rows of the parameters, by name."""
        low, high = part.numbers.unflatten(1, (-1, 2, self._group // 2)).unbind(2)
        weight = (high << BITS).bitwise_or_(low).flatten(1)
        return {"weight": weight, "zero": part.zeros, "scale": part.scales}

    def forward(self, x: Tensor) -> Tensor:
        if kernels.missing(x.device) is None:
            # Triton takes a while to import, and is not there on every machine.
            from model.triton import int4

            if int4.suits(self._group):
                return int4.linear(x, self.weight, self.zero, self.scale, self.bias)
        outputs, half = self.weight.shape
        count = max(_AT_ONCE // (2 * half), 1)
        found = []
        for first in range(0, outputs, count):
            rows = slice(first, first + count)
            bias = None if self.bias is None else self.bias[rows]
            found.append(functional.linear(x, self.dequantized(rows).to(x.dtype), bias))
        return torch.cat(found, -1)

    def dequantized(self, rows: slice) -> Tensor:
        """Rows of the weight, fp32 [rows, inputs]."""
        weight = self.weight[rows].unflatten(1, (-1, self._group // 2))
        numbers = torch.stack((weight & 15, weight >> BITS), 2).flatten(1)
        return _weight(numbers, self.zero[rows], self.scale[rows])


def keep_packed(
    skeleton: nn.Module, config: AwqConfig | None, names: Collection[str] | None = None
) -> None:
    """Put an ``Int4Linear`` in the place of every linear layer of the decoder's layers, or of those
    whose weight is among ``names``.

    Raises CheckpointError where the checkpoint is not of AWQ (``config`` is None), or a rank's
    columns do not end where a group does.
    """
    if config is None:
        raise CheckpointError("quantization awq needs a checkpoint that AWQ stored in four bits")
    for name, layer in list(skeleton.named_modules()):
        if not isinstance(layer, Linear) or isinstance(layer, Router):
            continue
        if name.startswith("decoder.layers.") and (names is None or f"{name}.weight" in names):
            inputs = layer.weight.shape[1]
            if inputs % config.group or config.group % 2:
                raise CheckpointError(
                    f"quantization awq cannot compute {name}: its {inputs} inputs on each rank are "
                    f"not made of whole groups of {config.group}, of an even number each"
                )
            skeleton.set_submodule(name, Int4Linear(layer, config.group))
