"""Which tensor of a checkpoint fills which parameter, as complete tables.

A table is built from the configuration and lists every key that must be in the files; keys are
looked up whole, never matched by pattern or substring. ``model.weights`` compares a table with
the files and copies; nothing here touches a tensor.
"""

import dataclasses
from collections.abc import Collection

from model.backbones import BACKBONES
from model.backbones.backbone import Slot, Tensors, below
from model.schema import CheckpointError, ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """One way of writing the keys: what stands before each part of the model."""

    name: str
    vision: str
    projector: str
    body: str
    head: str


CHAT = Prefixes("original", "vision_model.", "mlp1.", "language_model.model.", "language_model.")
HF = (
    Prefixes(
        "hf (model.language_model.*)",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.language_model.",
        "",
    ),
    Prefixes(
        "hf (language_model.model.*)",
        "vision_tower.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Names:
    """The keys of one checkpoint: ``slots`` must all be there, ``ignored`` may be.

    ``head`` is the key of the output matrix: in ``slots`` if the files hold it.
    """

    slots: dict[str, Slot]
    ignored: frozenset[str]
    head: str


def names_for(config: ModelConfig, keys: Collection[str]) -> Names:
    """The table for a checkpoint that holds ``keys``; picks the prefixes by the embedding's key."""
    backbone = BACKBONES[config.text.backbone]
    variants = (CHAT,) if config.format == "chat" else HF
    for prefixes in variants:
        if prefixes.body + backbone.embedding in keys:
            break
    else:
        wanted = " or ".join(prefixes.body + backbone.embedding for prefixes in variants)
        raise CheckpointError(f"the weights hold no tensor {wanted}")
    if config.format == "chat":
        vision, skipped = _chat_vision(config.vision)
        projector = {"0": "norm", "1": "first", "3": "second"}
    else:
        vision, skipped = _hf_vision(config.vision)
        projector = {"layer_norm": "norm", "linear_1": "first", "linear_2": "second"}
    slots = {prefixes.vision + key: slot for key, slot in vision.items()}
    for key, name in projector.items():
        for kind in ("weight", "bias"):
            slots[f"{prefixes.projector}{key}.{kind}"] = Slot(f"projector.{name}.{kind}")
    slots |= below(prefixes.body, backbone.tensors(config.text), parameter="decoder.")
    head = prefixes.head + backbone.head
    if head in keys:
        slots[head] = Slot("decoder.head.weight")
    ignored = {prefixes.vision + key for key in skipped}
    ignored |= {prefixes.body + key for key in backbone.ignored(config.text)}
    return Names(slots, frozenset(ignored), head)


def _chat_vision(config: VisionConfig) -> tuple[Tensors, list[str]]:
    table = {
        "embeddings.class_embedding": Slot("vision.class_embedding"),
        "embeddings.position_embedding": Slot("vision.position_embedding"),
        "embeddings.patch_embedding.weight": Slot("vision.patch.weight"),
        "embeddings.patch_embedding.bias": Slot("vision.patch.bias"),
    }
    skipped: list[str] = []
    for index in range(config.stored_layers):
        layer = {
            "attn.qkv.weight": Slot("attention.qkv.weight"),
            "attn.proj.weight": Slot("attention.out.weight"),
            "attn.proj.bias": Slot("attention.out.bias"),
            **_both("norm1", "norm1", config),
            **_both("norm2", "norm2", config),
            **_vision_mlp(),
            "ls1": Slot("scale1"),
            "ls2": Slot("scale2"),
        }
        if config.qkv_bias:
            layer["attn.qkv.bias"] = Slot("attention.qkv.bias")
        if config.qk_norm:
            layer["attn.q_norm.weight"] = Slot("attention.q_norm.weight")
            layer["attn.k_norm.weight"] = Slot("attention.k_norm.weight")
        _add_layer(table, skipped, f"encoder.layers.{index}.", layer, index, config)
    return table, skipped


def _hf_vision(config: VisionConfig) -> tuple[Tensors, list[str]]:
    table = {
        "embeddings.cls_token": Slot("vision.class_embedding"),
        "embeddings.position_embeddings": Slot("vision.position_embedding"),
        "embeddings.patch_embeddings.projection.weight": Slot("vision.patch.weight"),
        "embeddings.patch_embeddings.projection.bias": Slot("vision.patch.bias"),
    }
    skipped = ["embeddings.mask_token"]
    for kind in ("weight", "bias"):
        if config.final_norm:
            table[f"layernorm.{kind}"] = Slot(f"vision.norm.{kind}")
        else:
            skipped.append(f"layernorm.{kind}")
    size = config.hidden_size
    for index in range(config.stored_layers):
        layer = {
            "attention.projection_layer.weight": Slot("attention.out.weight"),
            "attention.projection_layer.bias": Slot("attention.out.bias"),
            **_both("layernorm_before", "norm1", config),
            **_both("layernorm_after", "norm2", config),
            **_vision_mlp(),
            "lambda_1": Slot("scale1"),
            "lambda_2": Slot("scale2"),
        }
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = (part * size, (part + 1) * size)
            layer[f"attention.{name}.weight"] = Slot("attention.qkv.weight", rows)
            if config.qkv_bias:
                layer[f"attention.{name}.bias"] = Slot("attention.qkv.bias", rows)
        if config.qk_norm:
            layer["attention.q_norm.weight"] = Slot("attention.q_norm.weight")
            layer["attention.k_norm.weight"] = Slot("attention.k_norm.weight")
        _add_layer(table, skipped, f"encoder.layer.{index}.", layer, index, config)
    return table, skipped


def _both(key: str, name: str, config: VisionConfig) -> Tensors:
    kinds = ("weight", "bias") if config.norm == "layer_norm" else ("weight",)
    return {f"{key}.{kind}": Slot(f"{name}.{kind}") for kind in kinds}


def _vision_mlp() -> Tensors:
    return {
        f"mlp.{name}.{kind}": Slot(f"{name}.{kind}")
        for name in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }


def _add_layer(
    table: Tensors,
    skipped: list[str],
    prefix: str,
    layer: Tensors,
    index: int,
    config: VisionConfig,
) -> None:
    if index >= config.layers:  # stored, but above the selected layer
        skipped.extend(prefix + key for key in layer)
        return
    for key, slot in layer.items():
        table[prefix + key] = Slot(f"vision.layers.{index}.{slot.parameter}", slot.rows)
