"""Checkpoints of any shape that other servers read too: random weights, small files of the demo's.

python -m benchmarks.gpu.checkpoint DIR --shape 1B --format chat --device cpu
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from demo import CHECKPOINT, CHECKPOINT_CHAT
from tests.checkpoints import INTERNVL3, Shape, make_checkpoint

TINY = Shape(
    vision_size=128,
    image_size=448,
    tile_size=448,
    size=128,
    heads=2,
    kv_heads=1,
    head_dim=64,
    vocab=1200,
    positions=8192,
)
SHAPES = {name: shape for name, shape in INTERNVL3.items() if shape.backbone == TINY.backbone}
SHAPES["tiny"] = TINY
"""By name, those that ``_CONFIG`` describes; a tiny one shows that all the rest works."""

# vLLM has no class for the original format's config.json; published checkpoints bring theirs.
_CONFIG = """
from transformers import PretrainedConfig, Qwen2Config


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        text = dict(llm_config or {})
        text.pop("model_type", None)
        self.llm_config = Qwen2Config(**text)
        super().__init__(**others)

    def get_text_config(self, decoder=None, encoder=None):
        return self.llm_config
"""


def make_peers_checkpoint(place: Path, shape: Shape, format: str, device: str) -> Path:
    """Write a checkpoint in bfloat16, numbers drawn by ``device``. What is there is whole.

    The tokenizer is the demo's with further tokens, as all servers must send what random weights
    write.
    """
    folder = place.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    make_checkpoint(folder, format=format, shape=shape, dtype=torch.bfloat16, device=device)
    small = {"hf": CHECKPOINT, "chat": CHECKPOINT_CHAT}[format]
    for file in small.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, folder / file.name)
    ids = _stretch(folder, shape)
    if format == "hf":
        side = {"height": shape.tile_size, "width": shape.tile_size}
        _change(folder / "config.json", image_token_id=ids["<IMG_CONTEXT>"])
        _change(folder / "preprocessor_config.json", size=side)
        _change(folder / "video_preprocessor_config.json", size=side)
        _change(folder / "processor_config.json", image_seq_length=shape.tokens_per_tile)
    else:
        (folder / "configuration_internvl_chat.py").write_text(_CONFIG, encoding="utf-8")
        names = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
        _change(folder / "config.json", auto_map=names)
        _change(folder / "preprocessor_config.json", size=shape.tile_size)
    return folder.rename(place)


def _stretch(folder: Path, shape: Shape) -> dict[str, int]:
    """Give the tokenizer as many tokens as the model has, and return the ids of the special ones.

    They are the last: transformers numbers them behind all others, whatever tokenizer.json says.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added, vocab = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
    first = shape.vocab - len(added)
    vocab |= {f"~{token}": token for token in range(len(vocab), first)}
    moved = {token["id"]: first + place for place, token in enumerate(added)}
    for token in added:
        token["id"] = moved[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    known = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {moved[int(old)]: token for old, token in known["added_tokens_decoder"].items()}
    _change(
        folder / "tokenizer_config.json",
        added_tokens_decoder=named,
        model_max_length=shape.positions,
    )
    ends = {token["content"]: token["id"] for token in added}
    _change(
        folder / "generation_config.json",
        eos_token_id=[ends["<|im_end|>"]],
        pad_token_id=ends["<|endoftext|>"],
    )
    return ends


def _change(file: Path, **values: object) -> None:
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | values, indent=1), encoding="utf-8")


def main() -> None:
    """Read the command line and write one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--format", choices=("hf", "chat"), default="chat")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    make_peers_checkpoint(given.folder, SHAPES[given.shape], given.format, given.device)


if __name__ == "__main__":
    main()
