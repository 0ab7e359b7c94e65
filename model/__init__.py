"""InternVL3 in torch: configuration, weights, forward pass. Knows no requests and no pictures."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from model.awq import keep_packed
from model.config import load_config
from model.internvl import InternVL
from model.names import names_for
from model.ops import NativeOps, choose
from model.parallel import Group, cuts, share
from model.quantize import quantize_layer, quantize_whole, quantizer
from model.schema import CheckpointError, ModelConfig, TextConfig
from model.stages import own_layers, own_slots, part_of
from model.weights import WeightFiles, compare, fill

__all__ = [
    "CheckpointError",
    "InternVL",
    "ModelConfig",
    "build_model",
    "count_parameters",
    "load_config",
    "skeleton",
]


def build_model(
    config: ModelConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    progress: Callable[[int, int], None] = lambda done, total: None,
    group: Group | None = None,
) -> InternVL:
    """Load a checkpoint folder's weights, or what a rank of ``group`` needs of them. Raises
    CheckpointError if they do not fit ``config``: all of them, whatever is needed here.

    ``quantization`` is "none", "fp8", "fp8-all" or "int8" (``model.quantize``; int8 on the CPU is
    that of ``model.ops.native``), "bnb-8bit" or "bnb-4bit" (``model.bnb``), or "awq", which keeps
    the four bits of a checkpoint (``model.awq``). Raises ValueError where the decoder cannot be
    divided among so many ranks.

    A stored output matrix is used whatever tie_word_embeddings says: published checkpoints have
    the flag wrong, and a dropped matrix gives fluent nonsense.
    """
    files = WeightFiles(folder, config.awq)
    names = names_for(config, files.shapes)
    tied = names.head not in names.slots
    if tied and not config.text.tied:
        raise CheckpointError(f"the weights do not fit config.json: missing (1): {names.head}")
    group = group or Group()
    whole = skeleton(config, tied=tied)
    compare(whole, names, files)
    model, slots = whole, names.slots
    if not group.is_alone:
        text = share(config.text, group.size)
        if group.stages > 1:
            one = skeleton(config, tied=tied, text=text)
            if quantization == "awq":
                keep_packed(one, config.awq, files.packed(slots))
            layers = own_layers(one, group.stages, dtype.itemsize, quantization)[group.stage]
            text, slots = part_of(text, layers), own_slots(slots, layers)
        model = skeleton(config, tied=tied, text=text, group=group)
    model.parameter_count = sum(p.numel() for p in whole.parameters())
    if quantization == "awq":
        keep_packed(model, config.awq, files.packed(slots))
    model.ops = choose(device, dtype, quantization)
    own = quantization == "int8" and isinstance(model.ops, NativeOps)
    pictures: list[nn.Module] = []
    if quantization == "fp8-all" and group.stage == 0:
        pictures = [model.vision.layers, model.projector]
    kind = "none" if own else quantization
    quantized = quantizer(model.decoder.layers, kind, device, pictures)

    def filled(name: str) -> None:
        below, _, rest = name.partition(".")
        if quantized is not None and below == "decoder":
            quantize_layer(model.decoder, rest, quantized)

    fill(
        model,
        slots,
        files,
        cuts(config.text, group.rank, group.size),
        device=device,
        dtype=dtype,
        progress=progress,
        filled=filled,
    )
    if group.stage == 0:
        model.vision.fit(config.tile_grid)
        model.vision.fold()
        if quantized is not None:
            for part in pictures:
                quantize_whole(part, quantized)
    head = model.decoder.output if group.stage == 0 else None
    decoding = set(model.decoder.modules())
    model.ops.prepare(list(model.modules()), head, decoding, draws=group.is_alone)
    return model.eval()


def skeleton(
    config: ModelConfig, *, tied: bool, text: TextConfig | None = None, group: Group | None = None
) -> InternVL:
    """The model without memory: every parameter on the meta device. ``text`` is the part of the
    decoder that a rank of ``group`` has.

    Raises CheckpointError for one that no machine could address.
    """
    try:
        with torch.device("meta"):
            return InternVL(config, text or config.text, tied=tied, group=group or Group())
    except RuntimeError as error:
        raise CheckpointError(f"config.json is of no model: {error}") from None


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model that ``config`` describes; needs no weights."""
    return sum(p.numel() for p in skeleton(config, tied=config.text.tied).parameters())
