"""InternLM2: the language model of InternVL3-9B, and of InternVL2 and 2.5 in 2B, 8B and 26B.

Queries, keys and values are one stored tensor, group by group: a key head's query heads, the key
head, the value head.
"""

import dataclasses

from model.backbones.backbone import Backbone, Rows, Slot, Tensors, in_layers
from model.backbones.qwen2 import text_config
from model.schema import Section, TextConfig


def _text_config(section: Section, tied: bool) -> TextConfig:
    bias = section.flag("bias", True)
    return dataclasses.replace(
        text_config(section, tied), backbone="InternLM2ForCausalLM", qkv_bias=bias, out_bias=bias
    )


def _pieces(config: TextConfig) -> tuple[Rows, ...]:
    """Where queries, keys and values stand in ``wqkv``."""
    size, queries = config.head_dim, config.heads // config.kv_heads
    group = (queries + 2) * size
    starts = range(0, config.kv_heads * group, group)

    def part(first: int, end: int) -> tuple[Rows, ...]:
        return tuple((start + first * size, start + end * size) for start in starts)

    return part(0, queries) + part(queries, queries + 1) + part(queries + 1, queries + 2)


def _tensors(config: TextConfig) -> Tensors:
    inner, pieces = config.intermediate_size, _pieces(config)
    layer = {
        "attention.wqkv.weight": Slot("attention.qkv.weight", pieces=pieces),
        "attention.wo.weight": Slot("attention.out.weight"),
        "feed_forward.w1.weight": Slot("mlp.gate_up.weight", (0, inner)),
        "feed_forward.w3.weight": Slot("mlp.gate_up.weight", (inner, 2 * inner)),
        "feed_forward.w2.weight": Slot("mlp.down.weight"),
        "attention_norm.weight": Slot("norm1.weight"),
        "ffn_norm.weight": Slot("norm2.weight"),
    }
    if config.qkv_bias:
        layer["attention.wqkv.bias"] = Slot("attention.qkv.bias", pieces=pieces)
        layer["attention.wo.bias"] = Slot("attention.out.bias")
    return {
        "tok_embeddings.weight": Slot("embedding.weight"),
        "norm.weight": Slot("norm.weight"),
        **in_layers(config, layer),
    }


def _ignored(config: TextConfig) -> set[str]:
    return {f"layers.{i}.attention.rotary_emb.inv_freq" for i in range(config.layers)}


INTERNLM2 = Backbone(
    model_type="internlm2",
    embedding="tok_embeddings.weight",
    head="output.weight",
    text_config=_text_config,
    tensors=_tensors,
    ignored=_ignored,
)
