"""InternVL3 in torch: configuration, weights, forward pass. Knows no requests and no pictures."""

from collections.abc import Callable
from pathlib import Path

import torch

from model.config import load_config
from model.internvl import InternVL
from model.names import names_for
from model.ops import NativeOps, choose
from model.parallel import Group, cuts
from model.quantize import quantize_layer, quantizer
from model.schema import CheckpointError, ModelConfig
from model.weights import WeightFiles, fill

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
    CheckpointError if they do not fit ``config``.

    ``quantization`` is "none", "fp8" or "int8" (``model.quantize``; int8 on the CPU is that of
    ``model.ops.native``), "bnb-8bit" or "bnb-4bit" (``model.bnb``). Raises ValueError where the
    decoder cannot be divided among so many ranks.

    A stored output matrix is used whatever tie_word_embeddings says: published checkpoints have
    the flag wrong, and a dropped matrix gives fluent nonsense.
    """
    files = WeightFiles(folder, config.awq)
    names = names_for(config, files.shapes)
    tied = names.head not in names.slots
    if tied and not config.text.tied:
        raise CheckpointError(f"the weights do not fit config.json: missing (1): {names.head}")
    group = group or Group()
    model = skeleton(config, tied=tied, group=group)
    parts = cuts(config.text, group.rank, group.size)
    model.ops = choose(device, dtype, quantization)
    own = quantization == "int8" and isinstance(model.ops, NativeOps)
    quantized = quantizer(model.decoder.layers, "none" if own else quantization, device)

    def filled(name: str) -> None:
        below, _, rest = name.partition(".")
        if quantized is not None and below == "decoder":
            quantize_layer(model.decoder, rest, quantized)

    model.parameter_count = fill(
        model, names, files, parts, device=device, dtype=dtype, progress=progress, filled=filled
    )
    model.vision.fit(config.tile_grid)
    model.vision.fold()
    model.ops.prepare(list(model.modules()), model.decoder.output)
    return model.eval()


def skeleton(config: ModelConfig, *, tied: bool, group: Group | None = None) -> InternVL:
    """The model without memory: every parameter on the meta device.

    Raises CheckpointError for one that no machine could address.
    """
    try:
        with torch.device("meta"):
            return InternVL(config, tied=tied, group=group or Group())
    except RuntimeError as error:
        raise CheckpointError(f"config.json is of no model: {error}") from None


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model that ``config`` describes; needs no weights."""
    return sum(p.numel() for p in skeleton(config, tied=config.text.tied).parameters())
