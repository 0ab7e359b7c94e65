"""Llama: the language model of native-format conversions of InternLM-based models.

One bias flag covers all four attention products; everything else is as in Qwen2.
"""

import dataclasses

from model.backbones.qwen2 import QWEN2, text_config
from model.schema import Section, TextConfig


def _text_config(section: Section, tied: bool) -> TextConfig:
    if section.flag("mlp_bias", False):
        raise section.error("mlp_bias", "is set; biases in the MLP are not supported")
    bias = section.flag("attention_bias", False)
    return dataclasses.replace(
        text_config(section, tied), backbone="LlamaForCausalLM", qkv_bias=bias, out_bias=bias
    )


LLAMA = dataclasses.replace(QWEN2, model_type="llama", text_config=_text_config)
