"""transformers' own InternVL over the weights of a checkpoint folder, in either format: what this
project's model is held against. No code of a checkpoint is run, and nothing here is shared with
``model``: names, joined tensors and integers are read in a way of their own.

InternLM2 and InternLM3, which transformers does not have, are its Llama with the tensors apart.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration

State = dict[str, Tensor]


class NoReference(Exception):
    """transformers cannot compute this; the message is for the operator."""


class Reference:
    """``dtype`` is that of weights and activations, ``quantization`` as in the server's settings.

    ``image_token`` is the id that the tokenizer has for it, whatever config.json says. Raises
    NoReference.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        *,
        device: str = "cpu",
        quantization: str = "none",
        image_token: int | None = None,
    ) -> None:
        config = config_of(folder)
        if image_token is not None:
            config.image_token_id = image_token
        # The kernels of torch are what the server uses too; these shall not be the same.
        config._attn_implementation = "eager"
        state = {
            key: tensor.to(device, dtype)
            for key, tensor in _native(folder, config)
            if tensor.numel()
        }
        config.tie_word_embeddings = "lm_head.weight" not in state
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
        _zero_biases(model, state)
        _join_experts(model, state)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise NoReference(f"transformers' model has other tensors: {error}") from None
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # not in the file, so left on the meta device
                module.__init__(config.text_config)
        self.model = model.to(device).eval()
        if quantization != "none":
            _quantize(self.model, quantization)
        self.dtype, self.device = dtype, device

    @torch.inference_mode()
    def logits(
        self, ids: list[int], pixels: Tensor | None = None, at: list[int] | None = None
    ) -> Tensor:
        """fp32 logits ``[len(at), vocab]`` of one prompt, on the CPU; all positions if none are
        named. ``pixels`` are normalised fp32, ``[T, 3, side, side]``."""
        out = self.model(
            **self._inputs(ids, pixels),
            use_cache=False,
            logits_to_keep=0 if at is None else torch.tensor(at, device=self.device),
        )
        logits: Tensor = out.logits[0].float().cpu()
        return logits

    @torch.inference_mode()
    def generate(
        self, ids: list[int], pixels: Tensor | None, count: int, ends: tuple[int, ...]
    ) -> tuple[list[int], Tensor]:
        """At most ``count`` likeliest tokens, up to one of ``ends``, and the fp32 logits that each
        was chosen by, ``[tokens, vocab]``."""
        chosen = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            return_dict_in_generate=True,
            output_logits=True,
        )
        out = self.model.generate(**self._inputs(ids, pixels), generation_config=chosen)
        return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float().cpu()

    def _inputs(self, ids: list[int], pixels: Tensor | None) -> dict[str, Tensor]:
        given = {"input_ids": torch.tensor([ids], device=self.device)}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if pixels is not None:
            given["pixel_values"] = pixels.to(self.device, self.dtype)
        return given


def config_of(folder: Path) -> InternVLConfig:
    """transformers' configuration for a folder of either format. Raises NoReference."""
    values = json.loads((folder / "config.json").read_text("utf-8"))
    values.pop("quantization_config", None)
    try:
        if "llm_config" in values:
            return _of_original(values)
        values["text_config"] = _language_model(values["text_config"])
        return InternVLConfig(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise NoReference(
            f"transformers cannot make a model of config.json: {type(error).__name__}: {error}"
        ) from None


def _of_original(values: dict[str, Any]) -> InternVLConfig:
    if values.get("ps_version", "v1") != "v2":
        raise NoReference("transformers has no pixel shuffle but v2, and ps_version is another")
    vision = values["vision_config"]
    side, patch = vision["image_size"], vision["patch_size"]
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return InternVLConfig(
        vision_config={name: vision[name] for name in same}
        | {
            "image_size": [side, side],
            "patch_size": [patch, patch],
            "hidden_act": vision.get("hidden_act", "gelu"),
            "attention_bias": vision.get("qkv_bias", False),
            "use_qk_norm": vision.get("qk_normalization", True),
            "norm_type": vision.get("norm_type", "rms_norm"),
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            "use_mean_pooling": True,
        },
        text_config=_language_model(values["llm_config"]),
        downsample_ratio=values.get("downsample_ratio", 0.5),
        vision_feature_layer=values.get("select_layer", -1),
    )


def _language_model(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers wants to know of it."""
    unused = ("auto_map", "quantization_config", "torch_dtype", "dtype", "tie_word_embeddings")
    text = {name: value for name, value in given.items() if name not in unused}
    name = (text.get("architectures") or [""])[0]
    if name == "InternLM2ForCausalLM":
        text |= {"model_type": "llama", "attention_bias": text.get("bias", True)}
    elif name == "InternLM3ForCausalLM":
        text |= {"model_type": "llama", "attention_bias": text.get("qkv_bias", False)}
    scaling = text.pop("rope_scaling", None) or {}
    if "rope_parameters" not in text:
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        theta = text.pop("rope_theta", 10000.0)
        text["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": theta}
    return text


_SPELLINGS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.output.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_model.", "model.vision_tower."),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
)
_ENCODER = (
    ("class_embedding", "cls_token"),
    ("position_embedding", "position_embeddings"),
    ("patch_embedding.", "patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
_INTERNLM2 = (
    ("tok_embeddings.", "embed_tokens."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".attention.wqkv.", ".self_attn.wqkv."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
)


def _native(folder: Path, config: InternVLConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder under the names that transformers gives them, one after the other."""
    text = config.text_config
    for key, tensor in _stored(folder):
        original = key.startswith("vision_model.")
        for old, new in _SPELLINGS:
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        for old, new in _ENCODER if original else _INTERNLM2:
            key = key.replace(old, new)
        if key.endswith((".inv_freq", ".mask_token")):
            continue
        if ".attention.qkv." in key:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                yield key.replace(".qkv.", f".{name}_proj."), part
        elif ".self_attn.wqkv." in key:
            groups = text.num_key_value_heads
            queries = text.num_attention_heads // groups
            heads = tensor.view(groups, queries + 2, -1, *tensor.shape[1:])
            parts = heads[:, :queries], heads[:, queries], heads[:, queries + 1]
            for name, part in zip("qkv", parts, strict=True):
                rows = part.reshape(-1, *tensor.shape[1:])
                yield key.replace(".wqkv.", f".{name}_proj."), rows
        else:
            yield key, tensor


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors under their own names; layers in four bits as the weights they stand for."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    packed: dict[str, State] = {}
    for name in names:
        with safe_open(str(folder / name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                layer, _, part = key.rpartition(".")
                if part not in ("qweight", "qzeros", "scales"):
                    yield key, file.get_tensor(key)
                    continue
                parts = packed.setdefault(layer, {})
                parts[part] = file.get_tensor(key)
                if len(parts) == 3:
                    yield layer + ".weight", _unpacked(**packed.pop(layer))


def _unpacked(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """A layer of AWQ (gemm): the lowest four bits of a word are its column 0, the next ones column
    2, then 4, 6, 1, 3, 5 and 7."""

    def numbers(words: Tensor) -> Tensor:
        found = torch.empty(len(words), words.shape[1] * 8)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            found[:, column::8] = (words.long() // 16**place % 16).float()
        return found

    group = len(qweight) // len(qzeros)
    zeros, steps = (part.repeat_interleave(group, 0) for part in (numbers(qzeros), scales.float()))
    return ((numbers(qweight) - zeros) * steps).T.contiguous()


def _join_experts(model: nn.Module, state: State) -> None:
    """transformers holds a layer's experts in two tensors; published files hold each by itself."""
    for name, parameter in model.named_parameters():
        if not name.endswith("mlp.experts.down_proj"):
            continue
        prefix = name.removesuffix("down_proj")
        stored = [
            [state.pop(f"{prefix}{n}.{part}_proj.weight") for part in ("gate", "up", "down")]
            for n in range(len(parameter))
        ]
        state[prefix + "gate_up_proj"] = torch.stack([torch.cat(each[:2]) for each in stored])
        state[name] = torch.stack([each[2] for each in stored])


def _zero_biases(model: nn.Module, state: State) -> None:
    """Some of transformers' models always have biases of attention: none is the same as zero."""
    like = state["lm_head.weight"]
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and "self_attn" in name and name not in state:
            state[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)


def _quantize(model: Any, kind: str) -> None:
    """Put layers in eight or four bits in the place of linear ones: all for "int8", all but the
    head for "fp8-all", those of the decoder for others."""
    whole, decoder = model.model, model.model.language_model.layers
    if any(hasattr(layer.mlp, "experts") for layer in decoder):
        raise NoReference("transformers' mixture of experts has no layers to quantise")
    parts = {"int8": [model], "fp8-all": [whole.vision_tower, whole.multi_modal_projector, decoder]}
    for owner in [m for part in parts.get(kind, [decoder]) for m in part.modules()]:
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                by_bnb = kind.startswith("bnb")
                setattr(owner, name, _by_bnb(child, kind) if by_bnb else _Rounded(child, kind))


class _Rounded(nn.Module):
    """Products of numbers in eight bits: weights with a scale per output, activations with one per
    token."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self.weight, self._scale = self._round(layer.weight.detach())
        self.bias = layer.bias

    def _round(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide, most = x.float(), 127.0 if self._kind == "int8" else 448.0
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
        if self._kind == "int8":
            return (wide / scale).round(), scale
        return (wide / scale).to(torch.float8_e4m3fn).float(), scale

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self._round(x)
        found = nn.functional.linear(rows, self.weight) * scale * self._scale[:, 0]
        if self.bias is not None:
            found = found + self.bias.float()
        return found.to(x.dtype)


def _by_bnb(layer: nn.Linear, kind: str) -> nn.Module:
    """As the model cards load it."""
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    new: nn.Module
    if kind == "bnb-8bit":
        new = bnb.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
    else:
        dtype = layer.weight.dtype
        new = bnb.Linear4bit(*shape, compute_dtype=dtype, compress_statistics=False)
    new = new.to(layer.weight.dtype)
    new.load_state_dict(layer.state_dict())
    return new.to(layer.weight.device).eval()
