"""Our logits equal transformers' for every flag of the architecture."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.reference import NoReference
from tests.checkpoints import (
    IMAGE_TOKEN,
    SIX_B_LIKE,
    Shape,
    Tensors,
    in_four_bits,
    make_checkpoint,
)
from tests.parity.direct import load, prompt, run
from tests.parity.reference import Reference

# Both sides compute in fp32 and differ only in the order of sums. The logits' standard deviation
# is about 3; the largest error seen over all cases is near 3e-5, so 2e-4 leaves room for another
# machine's kernels while a wrong epsilon, activation or order is off by 1e-2 and more.
TOLERANCE = 2e-4

BASE = Shape()
MIXTURE = dataclasses.replace(
    BASE, backbone="Qwen3MoeForCausalLM", text_bias=False, experts=6, experts_per_token=2
)
INTERNLM2 = dataclasses.replace(
    BASE, backbone="InternLM2ForCausalLM", text_bias=False, heads=8, kv_heads=2, head_dim=8
)
SHAPES = {
    "300M-like": BASE,
    "6B-like": SIX_B_LIKE,
    "tied": dataclasses.replace(BASE, tied=True),
    "6B-like, tied, no attention biases": dataclasses.replace(
        SIX_B_LIKE, tied=True, text_bias=False
    ),
    "one query head per key head": dataclasses.replace(BASE, kv_heads=4),
    "seven query heads per key head": dataclasses.replace(
        BASE, size=56, heads=14, kv_heads=2, head_dim=8
    ),
    "head size unlike hidden size by heads": dataclasses.replace(BASE, head_dim=24),
    "no attention biases": dataclasses.replace(BASE, text_bias=False),
    "layer norm without qkv bias": dataclasses.replace(BASE, qkv_bias=False),
    "rms norm with qkv bias": dataclasses.replace(BASE, norm="rms_norm"),
    "layer norm with qk norm": dataclasses.replace(BASE, qk_norm=True),
    "last vision layer not used": dataclasses.replace(BASE, vision_layers=3, select_layer=-2),
    "vision layer counted from the front": dataclasses.replace(
        BASE, vision_layers=3, select_layer=1
    ),
    "norm behind the vision layers": dataclasses.replace(BASE, mean_pooling=False),
    "tiles larger than the position embedding": dataclasses.replace(BASE, tile_size=112),
    "tiles smaller than the position embedding": dataclasses.replace(BASE, image_size=112),
    "Llama with all attention biases": dataclasses.replace(
        BASE, backbone="LlamaForCausalLM", out_bias=True
    ),
    "Llama without biases": dataclasses.replace(
        BASE, backbone="LlamaForCausalLM", text_bias=False, heads=8, kv_heads=2, head_dim=8
    ),
    "Qwen3": dataclasses.replace(BASE, backbone="Qwen3ForCausalLM", text_bias=False, head_dim=24),
    "Qwen3 with biases": dataclasses.replace(BASE, backbone="Qwen3ForCausalLM", out_bias=True),
    "Qwen3, mixture of experts": MIXTURE,
    "Qwen3, shares of experts not normalised, one layer dense": dataclasses.replace(
        MIXTURE, normalised_experts=False, experts_per_token=3, dense_layers=(1,), layers=3
    ),
    "another epsilon of the decoder's norms": dataclasses.replace(BASE, eps=1e-2),
    "plain rotary embedding": dataclasses.replace(BASE, dynamic=False, theta=1e6),
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = make_checkpoint(tmp_path, shape=shape)
    ours, theirs = load(folder), Reference(folder)
    for tiles in ([], [1], [5], [1, 3, 2]):
        ids, pixels = prompt(shape, tiles)
        expected = theirs.logits(ids, pixels)
        assert expected.std() > 1  # otherwise the tolerance would mean nothing
        error = (run(ours, ids, pixels) - expected).abs().max()
        assert error < TOLERANCE, f"{tiles}: {error}"


def test_a_prompt_up_to_the_last_position_equals_the_reference(tmp_path: Path) -> None:
    """Dynamic scaling must not set in anywhere inside the positions the model was trained on."""
    shape = dataclasses.replace(BASE, positions=160)
    folder = make_checkpoint(tmp_path, shape=shape)
    ids = torch.randint(0, 256, (160,), generator=torch.Generator().manual_seed(1)).tolist()
    error = (run(load(folder), ids, None) - Reference(folder).logits(ids)).abs().max()
    assert error < TOLERANCE


def test_the_picture_changes_the_logits(tmp_path: Path) -> None:
    ours = load(make_checkpoint(tmp_path))
    ids, pixels = prompt(BASE, [1])
    assert pixels is not None
    change = (run(ours, ids, pixels) - run(ours, ids, 255 - pixels)).abs().max()
    assert change > 100 * TOLERANCE


@pytest.mark.parametrize("biases", [False, True])
def test_internlm2_is_llama_with_its_tensors_joined(biases: bool, tmp_path: Path) -> None:
    joined = dataclasses.replace(INTERNLM2, text_bias=biases, out_bias=biases)
    llama = dataclasses.replace(joined, backbone="LlamaForCausalLM")
    ids, pixels = prompt(joined, [1, 2])
    ours = run(load(make_checkpoint(tmp_path / "joined", format="chat", shape=joined)), ids, pixels)
    reference = make_checkpoint(tmp_path / "llama", shape=llama)
    assert torch.equal(ours, run(load(reference), ids, pixels))
    assert (ours - Reference(reference).logits(ids, pixels)).abs().max() < TOLERANCE


def test_internlm3_is_llama_with_flags_of_its_own(tmp_path: Path) -> None:
    shape = dataclasses.replace(BASE, backbone="InternLM3ForCausalLM")
    ids, pixels = prompt(shape, [1])
    ours = run(load(make_checkpoint(tmp_path / "own", format="chat", shape=shape)), ids, pixels)
    qwen = make_checkpoint(tmp_path / "qwen", format="chat")
    assert torch.equal(ours, run(load(qwen), ids, pixels))


def test_both_formats_and_all_spellings_give_the_same_bits(tmp_path: Path) -> None:
    tied = dataclasses.replace(BASE, tied=True)
    for shape in (BASE, SIX_B_LIKE, tied, MIXTURE):
        outcomes = []
        for format, spelling in (("hf", "new"), ("hf", "old"), ("chat", "")):
            folder = tmp_path / f"{shape.backbone}{shape.norm}{shape.tied}{format}{spelling}"
            make_checkpoint(folder, format=format, spelling=spelling, shape=shape, shards=3)
            ids, pixels = prompt(shape, [1, 2])
            outcomes.append(run(load(folder), ids, pixels))
        assert torch.equal(outcomes[0], outcomes[1])
        assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("shape", [BASE, SIX_B_LIKE, INTERNLM2, MIXTURE], ids=lambda s: s.backbone)
def test_the_reference_reads_original_checkpoints_as_native_ones(
    shape: Shape, tmp_path: Path
) -> None:
    """By itself: what both read wrongly would not be found by comparing."""
    native = shape
    if shape is INTERNLM2:
        native = dataclasses.replace(shape, backbone="LlamaForCausalLM")
    chat = make_checkpoint(tmp_path / "chat", format="chat", shape=shape, shards=2)
    hf = make_checkpoint(tmp_path / "hf", shape=native, spelling="old")
    ids, pixels = prompt(shape, [1, 2])
    found = Reference(chat, image_token=IMAGE_TOKEN).logits(ids, pixels)
    assert torch.equal(found, Reference(hf).logits(ids, pixels))


def test_the_reference_reads_four_bits(tmp_path: Path) -> None:
    ids, pixels = prompt(BASE, [1])
    found = []
    for plain in (False, True):

        def change(tensors: Tensors, plain: bool = plain) -> None:
            in_four_bits(tensors, 16, plain=plain)

        folder = make_checkpoint(tmp_path / f"{plain}", change=change)
        found.append(Reference(folder).logits(ids, pixels))
    assert torch.equal(*found)


def test_the_reference_says_what_it_has_not(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "v1", format="chat", config={"ps_version": "v1"})
    with pytest.raises(NoReference, match="no pixel shuffle but v2"):
        Reference(folder)
    folder = make_checkpoint(tmp_path / "more", change=_add_a_tensor)
    with pytest.raises(NoReference, match="other tensors"):
        Reference(folder)
    with pytest.raises(NoReference, match="no layers to quantise"):
        Reference(make_checkpoint(tmp_path / "moe", shape=MIXTURE), quantization="int8")


def _add_a_tensor(tensors: Tensors) -> None:
    tensors["model.surplus.weight"] = torch.zeros(3)
