"""Checkpoints whose decoder is stored in four bits by AWQ, as LMDeploy's ``auto_awq`` writes them:
the weights that their integers stand for, so that the rest of the loader sees an ordinary one.

A linear layer of ``inputs`` and ``outputs`` is three tensors: ``qweight`` int32 [inputs,
outputs / 8], ``qzeros`` int32 [inputs / group, outputs / 8] and ``scales`` [inputs / group,
outputs]; weight = (q - zero) * scale, with unsigned q and zero. Eight numbers share a word.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model.schema import AwqConfig, CheckpointError, Section

BITS = 4
PARTS = ("qweight", "qzeros", "scales")
INTEGERS = (".qweight", ".qzeros")
# The column, of the eight of a word, that stands in its bits 0 to 3, 4 to 7 and so on.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = torch.tensor([BITS * _ORDER.index(column) for column in range(8)], dtype=torch.int32)


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


def dequantize(parts: Iterable[Tensor], config: AwqConfig) -> Tensor:
    """``PARTS`` of a layer to its weight [outputs, inputs], fp32: exact, and rounded once later."""
    qweight, qzeros, scales = parts
    groups = _unpacked(qweight).unflatten(0, (-1, config.group))
    weight = (groups - _unpacked(qzeros)[:, None]) * scales.float()[:, None]
    return weight.flatten(0, 1).T


def _unpacked(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] to numbers from 0 to 15, int8 [rows, columns]."""
    return ((words[..., None] >> _SHIFTS) & 15).to(torch.int8).flatten(1)
