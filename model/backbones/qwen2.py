"""Qwen2 and Qwen2.5: the language model of InternVL3-1B, 2B, 8B, 14B, 38B and 78B."""

from model.backbones.backbone import Backbone, Tensors, rope_theta
from model.schema import Section, TextConfig


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
        layers=section.integer("num_hidden_layers"),
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


def _tensors(config: TextConfig) -> Tensors:
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    inner = config.intermediate_size
    table: Tensors = {
        "embed_tokens.weight": ("embedding.weight", None),
        "norm.weight": ("norm.weight", None),
    }
    layer: Tensors = {
        "self_attn.q_proj.weight": ("attention.qkv.weight", (0, query)),
        "self_attn.k_proj.weight": ("attention.qkv.weight", (query, query + key)),
        "self_attn.v_proj.weight": ("attention.qkv.weight", (query + key, query + 2 * key)),
        "self_attn.o_proj.weight": ("attention.out.weight", None),
        "mlp.gate_proj.weight": ("gate_up.weight", (0, inner)),
        "mlp.up_proj.weight": ("gate_up.weight", (inner, 2 * inner)),
        "mlp.down_proj.weight": ("down.weight", None),
        "input_layernorm.weight": ("norm1.weight", None),
        "post_attention_layernorm.weight": ("norm2.weight", None),
    }
    if config.qkv_bias:
        layer["self_attn.q_proj.bias"] = ("attention.qkv.bias", (0, query))
        layer["self_attn.k_proj.bias"] = ("attention.qkv.bias", (query, query + key))
        layer["self_attn.v_proj.bias"] = ("attention.qkv.bias", (query + key, query + 2 * key))
    if config.out_bias:
        layer["self_attn.o_proj.bias"] = ("attention.out.bias", None)
    for index in range(config.layers):
        for name, (parameter, rows) in layer.items():
            table[f"layers.{index}.{name}"] = (f"layers.{index}.{parameter}", rows)
    return table


def _ignored(config: TextConfig) -> set[str]:
    per_layer = {f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
    return per_layer | {"rotary_emb.inv_freq"}


QWEN2 = Backbone(
    model_type="qwen2",
    embedding="embed_tokens.weight",
    head="lm_head.weight",
    text_config=text_config,
    tensors=_tensors,
    ignored=_ignored,
)
