"""The language models that can stand behind InternViT, by the architecture their config names."""

from model.backbones.backbone import Backbone
from model.backbones.internlm2 import INTERNLM2
from model.backbones.internlm3 import INTERNLM3
from model.backbones.llama import LLAMA
from model.backbones.qwen2 import QWEN2
from model.backbones.qwen3 import QWEN3, QWEN3_MOE

BACKBONES: dict[str, Backbone] = {
    "Qwen2ForCausalLM": QWEN2,
    "LlamaForCausalLM": LLAMA,
    "InternLM2ForCausalLM": INTERNLM2,
    "InternLM3ForCausalLM": INTERNLM3,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}
