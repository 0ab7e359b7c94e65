"""Qwen3, dense and as a mixture of experts: the language models of InternVL3.5.

Queries and keys are normed head by head; attention has no biases unless the config says so.
"""

import dataclasses

from model.backbones.backbone import Slot, Tensors, below, in_layers
from model.backbones.qwen2 import QWEN2, attention, ends, mlp, text_config
from model.schema import MOST_PARTS, ExpertsConfig, Section, TextConfig


def _dense(section: Section, tied: bool) -> TextConfig:
    bias = section.flag("attention_bias", False)
    # transformers' default; the hidden size says nothing of it.
    head_dim = section.integer("head_dim", 128)
    return dataclasses.replace(
        text_config(section, tied),
        backbone="Qwen3ForCausalLM",
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


def _sparse(section: Section, tied: bool) -> TextConfig:
    config = _dense(section, tied)
    # As published, and as transformers 5 writes it.
    name = "num_local_experts" if section.has("num_local_experts") else "num_experts"
    count = section.integer(name, high=MOST_PARTS)
    chosen = section.integer("num_experts_per_tok")
    if chosen > count:
        raise section.error("num_experts_per_tok", f"{chosen} is above {name} {count}")
    step = section.integer("decoder_sparse_step", 1)
    named = section.values.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(index) is int for index in named):
        raise section.error("mlp_only_layers", f"must be a list of layers, got {named!r}")
    between = {index for index in range(config.layers) if (index + 1) % step}
    experts = ExpertsConfig(
        count=count,
        chosen=chosen,
        intermediate_size=section.integer("moe_intermediate_size"),
        normalised=section.flag("norm_topk_prob", False),
        dense=frozenset(between.union(named)),
    )
    return dataclasses.replace(config, backbone="Qwen3MoeForCausalLM", experts=experts)


def _sparse_tensors(config: TextConfig) -> Tensors:
    assert config.experts is not None  # noqa: S101 - for the type checker
    table = {**ends(), **in_layers(config, attention(config))}
    dense = below("mlp.", mlp(config.intermediate_size))
    sparse: Tensors = {"mlp.gate.weight": Slot("mlp.router.weight")}
    for expert in range(config.experts.count):
        sparse |= below(f"mlp.experts.{expert}.", mlp(config.experts.intermediate_size))
    for index in range(config.layers):
        layer = dense if index in config.experts.dense else sparse
        table |= below(f"layers.{index}.", layer)
    return table


QWEN3 = dataclasses.replace(QWEN2, model_type="qwen3", text_config=_dense)
QWEN3_MOE = dataclasses.replace(
    QWEN2, model_type="qwen3_moe", text_config=_sparse, tensors=_sparse_tensors
)
