"""transformers' own InternVL over the same checkpoint folder, as the oracle of the parity tests."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLForConditionalGeneration

# (255 * mean, 255 * std) of ImageNet, which both implementations normalise with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


class Reference:
    """The oracle; ``folder`` must hold the native format with the newer keys, in one file."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = InternVLConfig(**values)
        # The flash kernel of torch 2.13 is what we use too; the oracle shall not share it.
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
        state = load_file(folder / "model.safetensors")
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
        _zero_biases(model, state)
        _join_experts(model, state)
        model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # not in the file, so left on the meta device
                module.__init__(config.text_config)  # type: ignore[misc]
        self._model = model.eval()
        self.dtype = dtype

    @torch.inference_mode()
    def logits(self, ids: list[int], tiles: Tensor | None = None) -> Tensor:
        """fp32 logits ``[tokens, vocab]`` of one prompt; tiles uint8 ``[T, 3, side, side]``."""
        pixels = None if tiles is None else ((tiles.float() - _MEAN) / _STD).to(self.dtype)
        out = self._model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False)
        return out.logits[0].float()

    @torch.inference_mode()
    def greedy(
        self,
        ids: list[int],
        tiles: Tensor | None,
        count: int,
        positions: list[float] | None = None,
    ) -> list[int]:
        """``count`` likeliest tokens, with a cache, one after the other. ``positions`` are those of
        the prompt; behind it they are whole numbers further."""
        pixels = None if tiles is None else ((tiles.float() - _MEAN) / _STD).to(self.dtype)
        at = list(range(len(ids))) if positions is None else positions
        out = self._model(
            input_ids=torch.tensor([ids]),
            pixel_values=pixels,
            use_cache=True,
            **self._at(at, len(ids)),
        )
        tokens: list[int] = []
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if len(tokens) == count:
                return tokens
            out = self._model(
                input_ids=torch.tensor([tokens[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
                **self._at([math.ceil(at[-1]) + len(tokens)], len(ids) + len(tokens)),
            )

    def _at(self, positions: list[float], length: int) -> dict[str, Tensor]:
        # Without a mask, positions that do not go up by one would mean several sequences in one.
        mask = torch.ones(1, length, dtype=torch.long)
        return {"position_ids": torch.tensor([positions]), "attention_mask": mask}


def _join_experts(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
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


def _zero_biases(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """transformers' Qwen2 always has q, k and v biases: none is the same as zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias") and "self_attn" in name and name not in state:
            state[name] = torch.zeros(parameter.shape)
