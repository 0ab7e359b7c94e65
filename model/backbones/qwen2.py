"""Qwen2 and Qwen2.5: the language model of InternVL3-1B, 2B, 8B, 14B, 38B and 78B."""

from model.backbones.backbone import (
    Backbone,
    Slot,
    Tensors,
    below,
    in_layers,
    parts,
    rope_theta,
    rotary_buffers,
)
from model.schema import MOST_PARTS, Section, TextConfig


def text_config(section: Section, tied: bool) -> TextConfig:
    """Read Qwen2's flags, and those that its relatives share."""
    section.choice("hidden_act", "silu", ("silu",))
    if section.flag("use_sliding_window", False):
        raise section.error("use_sliding_window", "is set; sliding windows are not supported")
    hidden_size = section.integer("hidden_size")
    heads = section.integer("num_attention_heads")
    kv_heads = section.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise section.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    head_dim = section.integer("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise section.error("head_dim", "must be even")
    return TextConfig(
        backbone="Qwen2ForCausalLM",
        hidden_size=hidden_size,
        layers=section.integer("num_hidden_layers", high=MOST_PARTS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=section.integer("intermediate_size"),
        vocab_size=section.integer("vocab_size"),
        eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(section),
        max_positions=section.integer("max_position_embeddings", 32768),
        qkv_bias=section.flag("attention_bias", True),
        out_bias=False,
        tied=tied,
    )


def tensors(config: TextConfig) -> Tensors:
    """Llama's names, which Qwen2 and Qwen3 share."""
    layer = {**attention(config), **below("mlp.", mlp(config.intermediate_size))}
    return {**ends(), **in_layers(config, layer)}


def ends() -> Tensors:
    """What stands before and behind the layers."""
    return {"embed_tokens.weight": Slot("embedding.weight"), "norm.weight": Slot("norm.weight")}


def attention(config: TextConfig) -> Tensors:
    """The norms and the attention of a layer."""
    layer = {
        "self_attn.o_proj.weight": Slot("attention.out.weight"),
        "input_layernorm.weight": Slot("norm1.weight"),
        "post_attention_layernorm.weight": Slot("norm2.weight"),
    }
    for name, rows in zip("qkv", parts(config), strict=True):
        layer[f"self_attn.{name}_proj.weight"] = Slot("attention.qkv.weight", rows)
        if config.qkv_bias:
            layer[f"self_attn.{name}_proj.bias"] = Slot("attention.qkv.bias", rows)
    if config.out_bias:
        layer["self_attn.o_proj.bias"] = Slot("attention.out.bias")
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = Slot("attention.q_norm.weight")
        layer["self_attn.k_norm.weight"] = Slot("attention.k_norm.weight")
    return layer


def mlp(size: int) -> Tensors:
    """An MLP, ``size`` wide."""
    return {
        "gate_proj.weight": Slot("gate_up.weight", (0, size)),
        "up_proj.weight": Slot("gate_up.weight", (size, 2 * size)),
        "down_proj.weight": Slot("down.weight"),
    }


QWEN2 = Backbone(
    model_type="qwen2",
    embedding="embed_tokens.weight",
    head="lm_head.weight",
    text_config=text_config,
    tensors=tensors,
    ignored=rotary_buffers,
)
