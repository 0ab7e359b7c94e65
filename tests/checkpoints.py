"""Checkpoints with seeded random weights, in both formats and all three spellings of the keys.

One shape and seed hold the same numbers however they are written. The gains make greedy text
vary and depend on the picture; plain Glorot weights repeat one token for ever. The keys are
spelled here independently of ``model.names``, which reads them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import small_tokenizer

Tensors = dict[str, Tensor]

IMAGE_TOKEN = small_tokenizer.reference().token_to_id("<IMG_CONTEXT>")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dimensions and flags of a model. The default takes milliseconds."""

    vision_size: int = 32
    vision_layers: int = 2
    vision_heads: int = 2
    vision_mlp: int = 64
    norm: str = "layer_norm"
    qkv_bias: bool = True
    qk_norm: bool = False
    mean_pooling: bool = True
    select_layer: int = -1
    image_size: int = 56
    tile_size: int = 56
    size: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 96
    backbone: str = "Qwen2ForCausalLM"
    text_bias: bool = True
    out_bias: bool = False
    tied: bool = False
    vocab: int = 512
    positions: int = 1024
    theta: float = 10_000.0
    dynamic: bool = True
    eps: float = 1e-6
    experts: int = 0
    experts_per_token: int = 2
    expert_mlp: int = 32
    normalised_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    @property
    def head_norms(self) -> bool:
        return self.backbone in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // 28) ** 2


INTERNVL3_1B = Shape(
    vision_size=1024,
    vision_layers=24,
    vision_heads=16,
    vision_mlp=4096,
    image_size=448,
    tile_size=448,
    size=896,
    layers=24,
    heads=14,
    kv_heads=2,
    head_dim=64,
    mlp=4864,
    vocab=151674,
    positions=32768,
    theta=1_000_000.0,
)

_SIX_B = {
    "vision_size": 3200, "vision_layers": 45, "vision_heads": 25, "vision_mlp": 12800,
    "norm": "rms_norm", "qkv_bias": False, "qk_norm": True,
}  # fmt: skip


def _family(size: int, layers: int, heads: tuple[int, int], mlp: int, **other: Any) -> Shape:
    values = {"head_dim": 128, "size": size, "layers": layers, "mlp": mlp} | other
    return dataclasses.replace(INTERNVL3_1B, heads=heads[0], kv_heads=heads[1], **values)


INTERNVL3 = {
    "1B": INTERNVL3_1B,
    "2B": _family(1536, 28, (12, 2), 8960),
    "8B": _family(3584, 28, (28, 4), 18944),
    "9B": _family(
        4096, 48, (32, 2), 10240, backbone="InternLM2ForCausalLM", text_bias=False,
        vocab=128521, theta=5e7, eps=1e-5,
    ),
    "14B": _family(5120, 48, (40, 8), 13824),
    "38B": _family(5120, 64, (40, 8), 27648, **_SIX_B),
    "78B": _family(8192, 80, (64, 8), 29568, **_SIX_B),
}  # fmt: skip
"""The published shapes, all seven; the vocabulary of the 9B is not known to the last token."""

SIX_B_LIKE = Shape(
    vision_size=60,
    vision_heads=5,
    norm="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)


def make_checkpoint(
    folder: Path,
    *,
    format: str = "hf",
    spelling: str = "new",
    shape: Shape = Shape(),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    weights: bool = True,
    change: Callable[[Tensors], None] | None = None,
    config: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Path:
    """Write a checkpoint folder and return it.

    ``format`` is "hf" or "chat"; ``spelling`` "new" (model.language_model.*) or "old"
    (language_model.model.*) for hf. ``change`` may edit the tensors, under their final keys,
    before they are saved; ``config`` overrides top-level entries of config.json (None deletes).
    Without ``weights`` there are only the small files. ``device`` draws the numbers, others on
    another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _weights(shape, seed, dtype, device) if weights else {}
    values = _hf_config(shape) if format == "hf" else _chat_config(shape)
    if format == "chat":
        tensors = _to_chat(tensors, shape)
    elif spelling == "new":
        tensors = {_new_key(key): tensor for key, tensor in tensors.items()}
    if change is not None:
        change(tensors)
    values |= config or {}
    values = {key: value for key, value in values.items() if value is not None}
    _write_json(folder / "config.json", values)
    if format == "hf":
        size = {"height": shape.tile_size, "width": shape.tile_size}
        processor = {"size": size, "min_patches": 1, "max_patches": 12, **IMAGENET}
        _write_json(folder / "preprocessor_config.json", processor)
    (folder / "tokenizer.json").write_text(small_tokenizer.tokenizer_json(), encoding="utf-8")
    _write_json(folder / "generation_config.json", {"do_sample": False})
    if weights:
        _save(folder, tensors, shards)
    return folder


def _save(folder: Path, tensors: Tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        keys = sorted(tensors)[shard::shards]
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    _write_json(folder / "model.safetensors.index.json", {"weight_map": where})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


class _Generator:
    """Seeded tensors by name: a tensor's numbers do not depend on which others are made."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str) -> None:
        self._seed = seed
        self._dtype = dtype
        self._device = device
        self.tensors: Tensors = {}

    def add(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        values = torch.randn(shape, generator=generator, device=self._device) * std + mean
        self.tensors[name] = values.to(self._dtype).cpu()

    def linear(self, name: str, out: int, inp: int, bias: bool, gain: float = 1.0) -> None:
        self.add(name + ".weight", out, inp, std=gain / math.sqrt(inp))
        if bias:
            self.add(name + ".bias", out, std=0.05)

    def norm(self, name: str, size: int, bias: bool) -> None:
        self.add(name + ".weight", size, std=0.05, mean=1.0)
        if bias:
            self.add(name + ".bias", size, std=0.05)


def _weights(shape: Shape, seed: int, dtype: torch.dtype, device: str) -> Tensors:
    """All tensors, under the older hf keys."""
    make = _Generator(seed, dtype, device)
    _vision_weights(make, shape)
    joined = 4 * shape.vision_size
    make.norm("multi_modal_projector.layer_norm", joined, bias=True)
    make.linear("multi_modal_projector.linear_1", shape.size, joined, bias=True)
    make.linear("multi_modal_projector.linear_2", shape.size, shape.size, bias=True)
    body = "language_model.model."
    # A tied head sees the last token in the hidden state; the layers have to drown it.
    loud = 4.0 if shape.tied else 1.5
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    spread = 3.0 / math.sqrt(shape.size)
    make.add(body + "embed_tokens.weight", shape.vocab, shape.size, std=spread)
    for index in range(shape.layers):
        layer = f"{body}layers.{index}."
        make.linear(layer + "self_attn.q_proj", query, shape.size, shape.text_bias, 1.5)
        make.linear(layer + "self_attn.k_proj", key, shape.size, shape.text_bias, 1.5)
        make.linear(layer + "self_attn.v_proj", key, shape.size, shape.text_bias)
        make.linear(layer + "self_attn.o_proj", shape.size, query, shape.out_bias, 0.3)
        if shape.head_norms:
            make.norm(layer + "self_attn.q_norm", shape.head_dim, bias=False)
            make.norm(layer + "self_attn.k_norm", shape.head_dim, bias=False)
        widths = {"mlp": shape.mlp}
        if shape.experts and index not in shape.dense_layers:
            make.linear(layer + "mlp.gate", shape.experts, shape.size, bias=False, gain=3.0)
            widths = {f"mlp.experts.{n}": shape.expert_mlp for n in range(shape.experts)}
        for mlp, width in widths.items():
            make.linear(f"{layer}{mlp}.gate_proj", width, shape.size, bias=False)
            make.linear(f"{layer}{mlp}.up_proj", width, shape.size, bias=False)
            make.linear(f"{layer}{mlp}.down_proj", shape.size, width, bias=False, gain=loud)
        make.norm(layer + "input_layernorm", shape.size, bias=False)
        make.norm(layer + "post_attention_layernorm", shape.size, bias=False)
    make.norm(body + "norm", shape.size, bias=False)
    if not shape.tied:
        make.add("language_model.lm_head.weight", shape.vocab, shape.size, std=spread)
    return make.tensors


def _vision_weights(make: _Generator, shape: Shape) -> None:
    size, tower = shape.vision_size, "vision_tower."
    affine = shape.norm == "layer_norm"
    make.add(tower + "embeddings.cls_token", 1, 1, size, std=0.5)
    positions = (shape.image_size // 14) ** 2 + 1
    make.add(tower + "embeddings.position_embeddings", 1, positions, size, std=0.3)
    patch = tower + "embeddings.patch_embeddings.projection"
    make.add(patch + ".weight", size, 3, 14, 14, std=1 / math.sqrt(588))
    make.add(patch + ".bias", size, std=0.05)
    for index in range(shape.vision_layers):
        layer = f"{tower}encoder.layer.{index}."
        for name in ("q_proj", "k_proj", "v_proj"):
            make.linear(f"{layer}attention.{name}", size, size, shape.qkv_bias)
        if shape.qk_norm:
            make.norm(layer + "attention.q_norm", size, bias=False)
            make.norm(layer + "attention.k_norm", size, bias=False)
        make.linear(layer + "attention.projection_layer", size, size, bias=True)
        make.add(layer + "lambda_1", size, std=0.05, mean=0.5)
        make.add(layer + "lambda_2", size, std=0.05, mean=0.5)
        make.norm(layer + "layernorm_before", size, affine)
        make.norm(layer + "layernorm_after", size, affine)
        make.linear(layer + "mlp.fc1", shape.vision_mlp, size, bias=True)
        make.linear(layer + "mlp.fc2", size, shape.vision_mlp, bias=True, gain=1.7)
    if not shape.mean_pooling:
        make.norm(tower + "layernorm", size, bias=True)


def _new_key(key: str) -> str:
    if key.startswith("language_model.model."):
        return "model.language_model." + key.removeprefix("language_model.model.")
    if key.startswith("language_model."):
        return key.removeprefix("language_model.")
    return "model." + key


_CHAT_KEYS = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.q_proj", "attn.qkv"),
    ("attention.q_norm", "attn.q_norm"),
    ("attention.k_norm", "attn.k_norm"),
    ("attention.projection_layer", "attn.proj"),
    ("lambda_1", "ls1"),
    ("lambda_2", "ls2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("vision_tower.", "vision_model."),
    ("multi_modal_projector.layer_norm", "mlp1.0"),
    ("multi_modal_projector.linear_1", "mlp1.1"),
    ("multi_modal_projector.linear_2", "mlp1.3"),
)


_INTERNLM2_KEYS = (
    ("model.embed_tokens", "model.tok_embeddings"),
    ("language_model.lm_head", "language_model.output"),
    ("self_attn.o_proj", "attention.wo"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)


def _to_internlm2(tensors: Tensors, shape: Shape) -> Tensors:
    """The language model's tensors as InternLM2 names and joins them."""
    out = {}
    for key, tensor in tensors.items():
        if ".self_attn.k_proj." in key or ".self_attn.v_proj." in key:
            continue
        if ".self_attn.q_proj." in key:
            queries, keys, values = (
                tensors[key.replace("q_proj", name)].unflatten(0, (-1, shape.head_dim))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            of_each = shape.heads // shape.kv_heads
            heads = []
            for group in range(shape.kv_heads):
                heads += [*queries[group * of_each : (group + 1) * of_each]]
                heads += [keys[group], values[group]]
            key = key.replace("self_attn.q_proj", "attention.wqkv")
            tensor = torch.cat(heads)
        for old, new in _INTERNLM2_KEYS:
            key = key.replace(old, new)
        out[key] = tensor
    return out


def _to_chat(tensors: Tensors, shape: Shape) -> Tensors:
    text = {key: t for key, t in tensors.items() if key.startswith("language_model.")}
    if shape.backbone == "InternLM2ForCausalLM":
        text = _to_internlm2(text, shape)
    out = dict(text)
    vision = {key: t for key, t in tensors.items() if not key.startswith("language_model.")}
    for key, tensor in vision.items():
        if ".attention.k_proj." in key or ".attention.v_proj." in key:
            continue
        if ".attention.q_proj." in key:
            parts = [key.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.cat([tensors[part] for part in parts])
        for old, new in _CHAT_KEYS:
            key = key.replace(old, new)
        out[key] = tensor
    return out


def _text_config(shape: Shape) -> dict[str, Any]:
    rope = {"rope_theta": shape.theta, "rope_type": "default"}
    if shape.dynamic:
        rope |= {"rope_type": "dynamic", "factor": 2.0}
    family = shape.backbone.removesuffix("ForCausalLM")
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_mlp,
        "norm_topk_prob": shape.normalised_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(shape.dense_layers),
    }
    biases = {"attention_bias": shape.text_bias}
    if family == "InternLM2":
        biases = {"bias": shape.text_bias}
    elif family == "InternLM3":
        biases = {"qkv_bias": shape.text_bias, "bias": False}
    return {
        "architectures": [shape.backbone],
        "model_type": {"Qwen3Moe": "qwen3_moe"}.get(family, family.lower()),
        "hidden_size": shape.size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": shape.eps,
        "rope_parameters": rope,
        **biases,
        **(experts if shape.experts else {}),
        "tie_word_embeddings": shape.tied,
        # The wrong id that original checkpoints carry here.
        "eos_token_id": 0,
    }


def _hf_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": "bfloat16",
        "image_token_id": IMAGE_TOKEN,
        "image_seq_length": shape.tokens_per_tile,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": shape.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": shape.tied,
        "text_config": _text_config(shape),
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": shape.vision_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "intermediate_size": shape.vision_mlp,
            "image_size": [shape.image_size, shape.image_size],
            "patch_size": [14, 14],
            "hidden_act": "gelu",
            "attention_bias": shape.qkv_bias,
            "use_qk_norm": shape.qk_norm,
            "norm_type": shape.norm,
            "layer_norm_eps": 1e-6,
            "use_mean_pooling": shape.mean_pooling,
        },
    }


def _chat_config(shape: Shape) -> dict[str, Any]:
    text = _text_config(shape)
    theta = text.pop("rope_parameters")["rope_theta"]
    scaling = {"type": "dynamic", "factor": 2.0} if shape.dynamic else None
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "torch_dtype": "bfloat16",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": shape.tile_size,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "use_thumbnail": True,
        "ps_version": "v2",
        "select_layer": shape.select_layer,
        "template": "internvl2_5",
        "tie_word_embeddings": shape.tied,
        "llm_config": text | {"rope_theta": theta, "rope_scaling": scaling},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": shape.vision_size,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "intermediate_size": shape.vision_mlp,
            "image_size": shape.image_size,
            "patch_size": 14,
            "hidden_act": "gelu",
            "qkv_bias": shape.qkv_bias,
            "qk_normalization": shape.qk_norm,
            "initializer_factor": 1.0,
            "norm_type": shape.norm,
            "layer_norm_eps": 1e-6,
        },
    }


def packed(numbers: np.ndarray) -> Tensor:
    """Eight numbers of a row to a word: column 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on."""
    rows, columns = numbers.shape
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for word in range(columns // 8):
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, word] |= numbers[:, 8 * word + column].astype(np.uint32) << (4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def in_four_bits(tensors: Tensors, group: int, *, plain: bool = False) -> None:
    """Replace the decoder's layers, but for routers, by such in four bits, with a scale for every
    ``group`` inputs, or, ``plain``, by what those stand for."""
    for key in list(tensors):
        layer = key.removesuffix(".weight")
        if ".layers." not in key or "vision" in key or "norm" in key or layer == key:
            continue
        if layer.endswith(".mlp.gate"):
            continue
        weight = tensors.pop(key).float().numpy().T  # [inputs, outputs]
        groups = weight.reshape(-1, group, weight.shape[1])
        low, high = groups.min(1), groups.max(1)
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales), 0, 15)
        numbers = np.clip(np.rint(groups / scales[:, None]) + zeros[:, None], 0, 15)
        if plain:
            stands_for = (numbers - zeros[:, None]) * scales[:, None].astype(np.float64)
            whole = stands_for.reshape(weight.shape).T
            tensors[key] = torch.from_numpy(np.ascontiguousarray(whole)).float()
        else:
            tensors[layer + ".qweight"] = packed(numbers.reshape(weight.shape))
            tensors[layer + ".qzeros"] = packed(zeros)
            tensors[layer + ".scales"] = torch.from_numpy(np.ascontiguousarray(scales))
