"""Pipeline parallelism: stages one behind the other, each with some of the decoder's layers.

The first stage has the first layers, and what stands before and behind all of them: encoder,
projector and embedding, the last norm and the head. A stage's hidden states go to the next one, and
from the last one back to the first.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from model.backbones.backbone import Slot, Tensors
from model.quantize import weight_bytes
from model.schema import TextConfig
from wire.knob import SettingError

if TYPE_CHECKING:
    from model.internvl import InternVL

_LAYERS = "decoder.layers."


def own_layers(model: "InternVL", stages: int, itemsize: int, quantization: str) -> list[range]:
    """Which layers each stage has, of a rank's ``model`` in one stage.

    Its weights, of ``itemsize`` bytes each, but for the layers' that are quantised, take as equal
    parts as whole layers allow. Raises ValueError where there are more stages than layers.
    """
    return share_out(*weight_sizes(model, itemsize, quantization), stages)


def weight_sizes(model: "InternVL", itemsize: int, quantization: str) -> tuple[int, list[int]]:
    """Bytes of what is not a layer of the decoder, and of each layer."""
    layers, pictures = model.decoder.layers, [model.vision.layers, model.projector]
    kind = quantization if quantization == "fp8-all" else "none"
    each = [weight_bytes(layer, itemsize, quantization) for layer in layers]
    rest = _count(model) - _count(layers) - sum(map(_count, pictures))
    return rest * itemsize + sum(weight_bytes(part, itemsize, kind) for part in pictures), each


def _count(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def check_stages(layers: int, stages: int) -> None:
    """Raise ValueError where not every stage would have a layer."""
    if stages > layers:
        raise SettingError(
            f"pipeline_parallel_size {stages} is more than the model's {layers} layers, of which "
            "each stage has at least one"
        )


def share_out(rest: int, sizes: Sequence[int], stages: int) -> list[range]:
    """The layers of each stage, of layers of ``sizes`` bytes, where the first stage has ``rest``
    bytes too.

    Each has at least one. The sum of squares of the stages' bytes is the least there can be. Raises
    ValueError where there are more stages than layers.
    """
    check_stages(len(sizes), stages)
    before = [-rest, *itertools.accumulate(sizes)]  # bytes before each layer
    # By how many layers are shared out: the sum of squares so far, and where stages end.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for stage in range(1, stages + 1):
        most = len(sizes) - (stages - stage)
        best = {
            end: min(
                (squares + (before[end] - before[start]) ** 2, (*ends, end))
                for start, (squares, ends) in best.items()
                if start < end
            )
            for end in range(stage, most + 1)
        }
    _, ends = best[len(sizes)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


def part_of(config: TextConfig, layers: range) -> TextConfig:
    """The decoder of a stage, whose layers are counted from 0 on."""
    experts = config.experts
    if experts is not None:
        dense = frozenset(layer - layers.start for layer in experts.dense if layer in layers)
        experts = dataclasses.replace(experts, dense=dense)
    return dataclasses.replace(config, layers=len(layers), experts=experts)


def own_slots(slots: Mapping[str, Slot], layers: range) -> Tensors:
    """Those of a stage's parameters, of the slots of all."""
    found: Tensors = {}
    for key, slot in slots.items():
        if not slot.parameter.startswith(_LAYERS):
            if layers.start == 0:
                found[key] = slot
            continue
        index, _, name = slot.parameter.removeprefix(_LAYERS).partition(".")
        if int(index) in layers:
            own = f"{_LAYERS}{int(index) - layers.start}.{name}"
            found[key] = dataclasses.replace(slot, parameter=own)
    return found
