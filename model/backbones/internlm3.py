"""InternLM3 under its own name: Llama's tensors, with flags of its own for the biases."""

import dataclasses

from model.backbones.llama import LLAMA
from model.backbones.qwen2 import text_config
from model.schema import Section, TextConfig


def _text_config(section: Section, tied: bool) -> TextConfig:
    if section.flag("bias", False):
        raise section.error("bias", "is set; biases in the MLP are not supported")
    return dataclasses.replace(
        text_config(section, tied),
        backbone="InternLM3ForCausalLM",
        qkv_bias=section.flag("qkv_bias", False),
    )


INTERNLM3 = dataclasses.replace(LLAMA, model_type="internlm3", text_config=_text_config)
