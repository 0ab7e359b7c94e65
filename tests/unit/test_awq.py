"""Checkpoints in four bits give the model that their integers stand for, wherever their config says
so, and what is no such checkpoint is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.sizing import devices_needed, size
from model import CheckpointError, InternVL, build_model, load_config, skeleton
from model.awq import Int4Linear
from model.layers import Linear, Router
from model.ops import NativeOps
from tests.checkpoints import Shape, Tensors, in_four_bits, make_checkpoint
from tests.parity.direct import load, prompt, run
from wire.settings import EngineSettings

GROUP = 16
AWQ = {
    "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True
}  # fmt: skip
QWEN = Shape()
MIXTURE = Shape(backbone="Qwen3MoeForCausalLM", text_bias=False, experts=4, dense_layers=(1,))
# Of the logits' deviation, on average: sums are in another order, and in bfloat16 rounded at
# another place. What the four bits themselves change is 0.1 and more.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.01}
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


def keep(folder: Path, dtype: torch.dtype = torch.float32, **other: Any) -> InternVL:
    """The model with its decoder's layers as they are stored."""
    config, cpu = load_config(folder), torch.device("cpu")
    return build_model(config, folder, device=cpu, dtype=dtype, quantization="awq", **other)


def linears(model: InternVL) -> dict[str, Linear]:
    found = model.decoder.layers.named_modules(prefix="layers")
    return {name: layer for name, layer in found if isinstance(layer, Linear)}


def weight_of(layer: Linear) -> Tensor:
    return layer.dequantized(slice(None)) if isinstance(layer, Int4Linear) else layer.weight


def sizes(folder: Path) -> dict[str, Tensor]:
    model = skeleton(load_config(folder), tied=False)
    return {name: layer.weight for name, layer in linears(model).items()}


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


@pytest.mark.parametrize("format", ["chat", "hf"])
@pytest.mark.parametrize("shape", [QWEN, INTERNLM, MIXTURE], ids=["Qwen2", "InternLM2", "mixture"])
def test_layers_that_stay_in_four_bits_are_the_same_weights(
    tmp_path: Path, shape: Shape, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a layer is expanded some rows at a time, and not in equal parts.
    monkeypatch.setattr("model.awq._AT_ONCE", 3000)
    if format == "hf" and shape is INTERNLM:
        shape = dataclasses.replace(shape, backbone="Qwen2ForCausalLM")
    folder = made(tmp_path, shape, format, shards=3)
    ids, tiles = prompt(shape, [1, 2])
    for dtype in (torch.float32, torch.bfloat16):
        kept, plain = keep(folder, dtype), load(folder, dtype)
        assert {type(layer) for layer in linears(kept).values()} == {Int4Linear, Router} - (
            set() if shape is MIXTURE else {Router}
        )
        assert isinstance(plain.ops, NativeOps) or all(
            torch.equal(weight_of(layer).to(dtype), linears(plain)[name].weight)
            for name, layer in linears(kept).items()
        )
        assert kept.parameter_count == plain.parameter_count
        found, expected = run(kept, ids, tiles), run(plain, ids, tiles)
        assert (found - expected).abs().mean() / expected.std() < NEAR[dtype]
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("shape", [QWEN, MIXTURE], ids=["Qwen2", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_held_is_a_quarter_and_what_was_counted(
    tmp_path: Path, dtype: torch.dtype, shape: Shape
) -> None:
    folder = made(tmp_path, shape)
    told: list[tuple[int, int]] = []
    kept = keep(folder, dtype, progress=lambda *counts: told.append(counts))
    weights = sizes(folder)
    for name, layer in linears(kept).items():
        if isinstance(layer, Router):
            continue
        held = sum(getattr(layer, part).nbytes for part in Int4Linear.TYPES)
        assert held == weights[name].numel() * (4 + 40 / GROUP) / 8
    settings = EngineSettings(quantization="awq", dtype=str(dtype).removeprefix("torch."))
    counted = size(load_config(folder), settings, 1 << 30).weights
    assert told == sorted(told)
    assert told[-2] == told[-1] == (counted, counted)


def test_a_layer_of_which_a_part_is_stored_whole_is_expanded(tmp_path: Path) -> None:
    """Keys of one layer as they were trained: queries, keys and values are one matrix here."""
    key = "language_model.model.layers.1.self_attn.k_proj"

    def change(tensors: Tensors) -> None:
        trained = tensors[f"{key}.weight"]
        in_four_bits(tensors, GROUP, plain=False)
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{key}.{part}"]
        tensors[f"{key}.weight"] = trained

    folder = made(tmp_path, change=change)
    ids, tiles = prompt(QWEN, [1])
    kept, plain = keep(folder), load(folder)
    others = {name for name, layer in linears(kept).items() if type(layer) is Linear}
    assert others == {"layers.1.attention.qkv"}
    expected = run(plain, ids, tiles)
    assert (run(kept, ids, tiles) - expected).abs().mean() / expected.std() < NEAR[torch.float32]


def test_four_bits_that_are_not_there_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    message = "quantization awq needs a checkpoint that AWQ stored in four bits"
    with pytest.raises(CheckpointError, match=message):
        keep(folder)
    with pytest.raises(CheckpointError, match=message):
        size(load_config(folder), EngineSettings(quantization="awq"), 1 << 30)


def test_groups_that_ranks_would_cut_are_refused_by_name(tmp_path: Path) -> None:
    shape = Shape(heads=8, kv_heads=4, head_dim=16, mlp=96)
    config = load_config(made(tmp_path, shape))

    def planned(ranks: int) -> object:
        settings = EngineSettings(quantization="awq", tensor_parallel_size=ranks)
        return size(config, settings, 1 << 30)

    planned(2)
    needed = devices_needed(config, EngineSettings(quantization="awq"), 1 << 20)
    assert needed is None  # a megabyte is never enough, however the groups are cut
    with pytest.raises(
        CheckpointError,
        match=r"decoder.layers.0.mlp.down: its 24 inputs on each rank are not made of whole groups "
        "of 16",
    ):
        planned(4)


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
