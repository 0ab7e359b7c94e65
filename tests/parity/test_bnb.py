"""Layers by bitsandbytes give the logits of transformers' model with the same layers replaced."""

import dataclasses
import sys
from pathlib import Path

import bitsandbytes.nn as bnb
import pytest
import torch

from model import CheckpointError, InternVL, build_model, load_config
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.direct import prompt, run
from tests.parity.reference import Reference

FP32 = torch.float32
KINDS = ("bnb-8bit", "bnb-4bit")
# Rows of 64: a block of four-bit numbers then never spans two rows, fused or not.
SHAPE = dataclasses.replace(Shape(), mlp=128)
# Of the logits' deviation, on average. In eight bits both sides compute the same whole numbers. In
# four, the kernel rounds activations to bfloat16, and what is added before may differ in a bit.
# What the quantisation itself changes is 0.02 and 0.27.
TOLERANCE = {"bnb-8bit": 1e-5, "bnb-4bit": 5e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bnb"), shape=SHAPE, dtype=FP32)


def build(folder: Path, kind: str) -> InternVL:
    config = load_config(folder)
    return build_model(config, folder, device=torch.device("cpu"), dtype=FP32, quantization=kind)


def replaced(folder: Path, kind: str) -> Reference:
    """The oracle, with each of the decoder's linear layers by itself in bitsandbytes' hands."""
    reference = Reference(folder)
    layers = reference.model.model.language_model.layers
    for owner in list(layers.modules()):
        for name, child in list(owner.named_children()):
            if not isinstance(child, torch.nn.Linear):
                continue
            shape = (child.in_features, child.out_features, child.bias is not None)
            if kind == "bnb-8bit":
                new = bnb.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            else:
                new = bnb.Linear4bit(*shape, compute_dtype=FP32, compress_statistics=False)
            new.load_state_dict(child.state_dict())
            setattr(owner, name, new.to("cpu").eval())
    return reference


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_references(folder: Path, kind: str) -> None:
    ours, theirs = build(folder, kind), replaced(folder, kind)
    ids, tiles = prompt(SHAPE, [1, 2])
    expected = theirs.logits(ids, tiles)
    error = (run(ours, ids, tiles) - expected).abs().mean() / expected.std()
    assert error < TOLERANCE[kind]
    exact = run(build(folder, "none"), ids, tiles)
    assert (exact - expected).abs().mean() / expected.std() > 10 * TOLERANCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_decoders_layers_are_small(folder: Path, kind: str) -> None:
    model = build(folder, kind)
    small = {
        name.replace(".inner", "")
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.int8, torch.uint8)
    }
    layers = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert small == {
        f"decoder.layers.{i}.{name}.weight" for i in range(SHAPE.layers) for name in layers
    }


def test_a_machine_without_the_library_is_told_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(CheckpointError, match="needs that library: pip install bitsandbytes"):
        build(folder, "bnb-8bit")
