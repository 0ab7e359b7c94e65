"""The language models that can stand behind InternViT, by the architecture their config names."""

from model.backbones.backbone import Backbone
from model.backbones.llama import LLAMA
from model.backbones.qwen2 import QWEN2

BACKBONES: dict[str, Backbone] = {"Qwen2ForCausalLM": QWEN2, "LlamaForCausalLM": LLAMA}
