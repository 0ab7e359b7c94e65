"""Write the trained weights as a checkpoint in both published formats: ``python -m demo.build``.

Both folders hold the same numbers. The names and files are those of the InternVL3 repositories,
so that transformers and any other InternVL server can read them too.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo import CHECKPOINT, CHECKPOINT_CHAT
from demo.network import TOKENS_PER_TILE, Shape
from demo.pictures import PATCH, PURE, TILE, Scene, Thing, render, write_number
from demo.tokenizer import PLAIN, SPECIAL, special_id

SYSTEM = "You are a helpful assistant."
"""System sentence of the chat format; the model was trained with it and without."""

MAX_POSITIONS = 4096
HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ['image', 'image_url'] %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def text_config(s: Shape, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.mlp,
        "vocab_size": s.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": s.theta,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": s.layers,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }


def vision_config(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.vision_width,
        "num_hidden_layers": s.vision_layers,
        "num_attention_heads": s.vision_heads,
        "intermediate_size": s.vision_mlp,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
    }


def hf_config(s: Shape, ids: dict[str, int]) -> dict[str, Any]:
    vision = vision_config(s) | {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "attention_bias": True,
        "use_qk_norm": False,
        "layer_scale_init_value": 1.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0",
        "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": TOKENS_PER_TILE,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text_config(s, ids),
        "vision_config": vision,
    }


def chat_config(s: Shape, ids: dict[str, int]) -> dict[str, Any]:
    vision = vision_config(s) | {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "image_size": TILE,
        "patch_size": PATCH,
        "qkv_bias": True,
        "qk_normalization": False,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "use_flash_attn": False,
        "initializer_factor": 1.0,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "system_message": SYSTEM,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "hidden_size": s.width,
        "tie_word_embeddings": False,
        "llm_config": text_config(s, ids),
        "vision_config": vision,
    }


CHAT_NAMES = (
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    (
        "model.vision_tower.embeddings.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        "model.vision_tower.embeddings.patch_embeddings.projection",
        "vision_model.embeddings.patch_embedding",
    ),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
    (".attention.projection_layer.", ".attn.proj."),
    (".lambda_1", ".ls1"),
    (".lambda_2", ".ls2"),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.language_model.", "language_model.model."),
)


def to_chat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Native names to the original ones; the encoder's q, k and v become one tensor."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".vision_tower." in name and (".k_proj." in name or ".v_proj." in name):
            continue
        if ".vision_tower." in name and ".q_proj." in name:
            parts = [
                tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            tensor, name = torch.cat(parts), name.replace(".attention.q_proj.", ".attn.qkv.")
        if name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        for native, original in CHAT_NAMES:
            name = name.replace(native, original)
        out[name] = tensor.contiguous()
    return out


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Tokenizer, folder: Path, ids: dict[str, int], native: bool) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": MAX_POSITIONS,
        "add_prefix_space": False,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(number): {
                "content": name,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
                "special": name not in PLAIN,
            }
            for name, number in ids.items()
        },
        "additional_special_tokens": [n for n in SPECIAL if n not in PLAIN][1:],
        "chat_template": HF_TEMPLATE if native else CHAT_TEMPLATE,
    }
    if native:
        names = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        config |= {"processor_class": "InternVLProcessor", "extra_special_tokens": names, **names}
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8")


def write_processors(folder: Path, native: bool) -> None:
    image: dict[str, Any] = {
        "do_resize": True,
        "size": {"height": TILE, "width": TILE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    if not native:
        write_json(
            folder / "preprocessor_config.json",
            {
                "feature_extractor_type": "CLIPFeatureExtractor",
                "crop_size": TILE,
                "size": TILE,
                "do_center_crop": True,
                "do_resize": True,
                "do_normalize": True,
                "image_mean": MEAN,
                "image_std": STD,
                "resample": 3,
            },
        )
        return
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    processor = {"processor_class": "InternVLProcessor"}
    kind = {"image_processor_type": "GotOcr2ImageProcessor"}
    write_json(folder / "preprocessor_config.json", image | tiles | kind | processor)
    video = {"video_processor_type": "InternVLVideoProcessor"}
    write_json(folder / "video_preprocessor_config.json", image | video | processor)
    write_json(folder / "processor_config.json", {"image_seq_length": TOKENS_PER_TILE} | processor)


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer, *, native: bool
) -> None:
    """Write one checkpoint folder; ``tensors`` have native names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape = Shape()
    ids = {name: special_id(tokenizer, name) for name in SPECIAL}
    write_json(folder / "config.json", (hf_config if native else chat_config)(shape, ids))
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    write_tokenizer(tokenizer, folder, ids, native)
    write_processors(folder, native)
    named = tensors if native else to_chat(tensors)
    save_file(named, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only


def trained_weights(work: Path) -> dict[str, Tensor]:
    """The float32 masters of a training run as bfloat16, without the training heads."""
    state = load_file(work / "state.safetensors")
    return {
        name.removeprefix("master/"): tensor.bfloat16()
        for name, tensor in sorted(state.items())
        if name.startswith("master/") and not name.startswith("master/heads.")
    }


def write_samples(folder: Path) -> None:
    """The pictures that the README and the start message send: never seen in training."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(20261121)
    circle = Scene(224, 224, (255, 255, 255))
    circle.things.append(Thing("circle", "red", 112, 112, 60, PURE["red"]))
    shapes = Scene(300, 200, (235, 235, 240))
    shapes.things.append(Thing("square", "blue", 60, 120, 36, PURE["blue"]))
    shapes.things.append(Thing("star", "orange", 155, 70, 40, PURE["orange"]))
    shapes.things.append(Thing("triangle", "green", 245, 130, 38, PURE["green"]))
    number = Scene(200, 150, (255, 255, 255))
    write_number(rng, number, "42", 56)
    samples = {"red-circle": circle, "shapes": shapes, "written-number": number}
    for name, scene in samples.items():
        render(scene, rng).save(folder / f"{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.build", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="demo.train's folder")
    parser.add_argument("--hf", type=Path, default=CHECKPOINT, help="folder to write")
    parser.add_argument("--chat", type=Path, default=CHECKPOINT_CHAT, help="folder to write")
    args = parser.parse_args()
    tensors = trained_weights(args.work)
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    write_checkpoint(args.hf, tensors, tokenizer, native=True)
    write_checkpoint(args.chat, tensors, tokenizer, native=False)
    write_samples(Path(__file__).parent / "samples")
    size = (args.hf / "model.safetensors").stat().st_size
    print(f"{sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
