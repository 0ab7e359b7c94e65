"""Checkpoints in four bits give the model that their integers stand for, wherever their config says
so, and what is no such checkpoint is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import CheckpointError, load_config
from tests.checkpoints import Shape, Tensors, in_four_bits, make_checkpoint
from tests.parity.direct import load, prompt, run

GROUP = 16
AWQ = {
    "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True
}  # fmt: skip
QWEN = Shape()
INTERNLM = dataclasses.replace(QWEN, backbone="InternLM2ForCausalLM", text_bias=False)


def made(folder: Path, shape: Shape = QWEN, format: str = "chat", **other: Any) -> Path:
    text = "llm_config" if format == "chat" else "text_config"
    bare = make_checkpoint(folder / "bare", shape=shape, format=format, weights=False)
    values = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    values[text]["quantization_config"] = AWQ | other.pop("awq", {})
    return make_checkpoint(
        folder / "packed",
        shape=shape,
        format=format,
        change=other.pop("change", lambda tensors: in_four_bits(tensors, GROUP, plain=False)),
        config={text: values[text]},
        **other,
    )


@pytest.mark.parametrize("format", ["chat", "hf"])
@pytest.mark.parametrize("shape", [QWEN, INTERNLM], ids=["Qwen2", "InternLM2"])
def test_the_model_is_the_one_that_the_integers_stand_for(
    tmp_path: Path, shape: Shape, format: str
) -> None:
    if format == "hf":
        shape = dataclasses.replace(shape, backbone="Qwen2ForCausalLM")
    plain = make_checkpoint(
        tmp_path / "plain",
        shape=shape,
        format=format,
        change=lambda tensors: in_four_bits(tensors, GROUP, plain=True),
    )
    ids, tiles = prompt(shape, [1, 2])
    # The parts of a layer may be in different files.
    ours = run(load(made(tmp_path, shape, format, shards=3)), ids, tiles)
    assert torch.equal(ours, run(load(plain), ids, tiles))
    whole = make_checkpoint(tmp_path / "whole", shape=shape, format=format)
    assert (ours - run(load(whole), ids, tiles)).abs().mean() > 1e-2


def test_the_config_may_say_so_at_the_top(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path,
        change=lambda tensors: in_four_bits(tensors, GROUP, plain=False),
        config={"quantization_config": AWQ},
    )
    assert load(folder).parameter_count == load(make_checkpoint(tmp_path / "b")).parameter_count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; supported: awq"),
        ({"bits": 8}, "bits is 8; supported: 4"),
        ({"version": "marlin"}, "version is 'marlin'; supported: gemm"),
        ({"zero_point": False}, "zero_point false is not supported"),
        ({"group_size": 0}, "group_size must be a whole number from 1 to"),
    ],
)
def test_other_ways_of_quantising_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(made(tmp_path, awq=change))


def test_a_layer_that_is_a_single_number_is_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        in_four_bits(tensors, GROUP, plain=False)
        key = "language_model.model.layers.1.mlp.down_proj.qweight"
        tensors[key] = torch.tensor(7, dtype=torch.int32)

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj: its qweight, .* are \[\],"):
        load(made(tmp_path, change=change))


def test_layers_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        in_four_bits(tensors, GROUP, plain=False)
        del tensors["language_model.model.layers.1.mlp.down_proj.qzeros"]

    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj: its qweight, qzeros"):
        load(made(tmp_path, change=change))


def test_integers_without_a_config_that_tells_of_them_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path, change=lambda tensors: in_four_bits(tensors, GROUP, plain=False)
    )
    with pytest.raises(CheckpointError, match=r"type I32, which config\.json does not account for"):
        load(folder)
