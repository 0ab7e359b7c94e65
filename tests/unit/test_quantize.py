"""Linear layers in float8, by torch's own products, which the CPU has too; and the gate."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import quantization
from demo import CHECKPOINT
from engine.runner import ModelRunner
from model import InternVL, build_model, load_config, skeleton
from model.layers import Linear
from model.mlp import Experts
from model.ops import Ops, choose
from model.quantize import PRODUCTS, Fp8Linear, Int8Linear, quantize_whole, to_fp8, to_int8
from model.schema import CheckpointError
from model.stages import weight_sizes
from tests import fp8
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.direct import prompt, run
from tests.parity.reference import Reference
from wire.settings import EngineSettings

SHAPE = Shape()


@pytest.fixture(autouse=True)
def plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: products by torch."""
    monkeypatch.setattr("model.choose", lambda *_: Ops())


def build(folder: Path, kind: str) -> InternVL:
    config = load_config(folder)
    return build_model(
        config, folder, device=torch.device("cpu"), dtype=torch.bfloat16, quantization=kind
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


def test_rows_are_rounded_to_the_nearest_of_their_scale() -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-6, 6, 50)[:, None]
    rows[7] = 0
    found, scale = to_fp8(rows)
    assert found.dtype == torch.float8_e4m3fn
    assert (scale.shape, scale.dtype) == ((50, 1), torch.float32)
    back = found.double() * scale
    # Three bits of mantissa; below the least normal number, 2^-6, steps of 2^-9.
    allowed = torch.maximum(rows.abs() / 16, scale * 2.0**-10)
    assert bool(((back - rows).abs() <= allowed * 1.001).all())
    largest = found.double().abs().amax(-1)
    assert largest.tolist() == [0.0 if row == 7 else 448.0 for row in range(50)]


@fp8.needed
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_the_product_of_what_was_rounded(product: Any, bias: bool) -> None:
    layer = Linear(32, 48, bias=bias)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16()
    x = torch.randn(2, 5, 32).bfloat16() * torch.tensor([0.01, 1, 3, 50, 0])[:, None].bfloat16()
    found = Fp8Linear(layer, product)(x)
    assert (found.shape, found.dtype) == ((2, 5, 48), torch.bfloat16)
    (tokens, scale), (weight, weight_scale) = to_fp8(x.flatten(0, 1)), to_fp8(layer.weight)
    expected = (tokens.double() * scale) @ (weight.double() * weight_scale).T
    if layer.bias is not None:
        expected += layer.bias.double()
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 31, 33])
def test_a_layer_in_whole_numbers_computes_exactly_what_was_rounded(tokens: int) -> None:
    layer = Linear(32, 48, bias=True)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16()
    x = torch.randn(tokens, 32).bfloat16() * torch.logspace(-2, 2, tokens)[:, None].bfloat16()
    found = Int8Linear(layer)(x)
    (rows, scale), (weight, weight_scale) = to_int8(x), to_int8(layer.weight)
    for whole, its_scale, true in ((rows, scale, x), (weight, weight_scale, layer.weight)):
        assert int(whole.abs().amax(-1).min()) == 127
        assert bool(((whole * its_scale - true.float()).abs() <= its_scale * 0.50001).all())
    assert layer.bias is not None
    products = (rows.double() @ weight.double().T).float()
    torch.testing.assert_close(
        found, (products * scale * weight_scale.T + layer.bias).bfloat16(), rtol=0, atol=0
    )
    for index in range(tokens):  # whatever is computed beside it
        assert torch.equal(Int8Linear(layer)(x[index : index + 1])[0], found[index])


def test_in_whole_numbers_answers_are_near(folder: Path) -> None:
    ids, tiles = prompt(SHAPE, [2])
    model = build(folder, "int8")
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 4 * SHAPE.layers
    true, found = (run(one, ids, tiles).double() for one in (build(folder, "none"), model))
    assert 0 < (found - true).abs().mean() / true.std() < 0.05


@fp8.needed
@pytest.mark.parametrize("kind", ["fp8", "fp8-all"])
def test_the_layers_of_these_parts_are_quantised_and_nothing_else(folder: Path, kind: str) -> None:
    model = build(folder, kind)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    quantised = {name for name, dtype in kinds.items() if dtype == torch.float8_e4m3fn}
    layers = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    expected = {f"decoder.layers.{i}.{name}.weight" for i in range(SHAPE.layers) for name in layers}
    if kind == "fp8-all":
        layers = ("attention.qkv", "attention.out", "fc1", "fc2")
        numbers = range(SHAPE.vision_layers)
        expected |= {f"vision.layers.{i}.{name}.weight" for i in numbers for name in layers}
        expected |= {f"projector.{name}.weight" for name in ("first", "second")}
    assert quantised == expected
    scales = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert scales == {name.replace("weight", "scale") for name in quantised}
    exact = build(folder, "none")
    assert exact.parameter_count == model.parameter_count
    ids, tiles = prompt(SHAPE, [2])
    true, found = (run(one, ids, tiles).double() for one in (exact, model))
    wrong = (found - true).abs().mean() / true.std()
    assert 0 < wrong < (0.1 if kind == "fp8" else 0.2)
    bits = {p.data_ptr(): p.numel() * p.itemsize for p in model.parameters() if p.dim() > 1}
    rest, each = weight_sizes(skeleton(model.config, tied=False), 2, kind)
    assert rest + sum(each) == pytest.approx(sum(bits.values()), rel=0.02)


@fp8.needed
@pytest.mark.parametrize("kind", ["fp8", "fp8-all"])
def test_it_is_as_far_from_exact_as_transformers_model_likewise(folder: Path, kind: str) -> None:
    """What `internvl verify` asks of it, on a device."""
    ids, tiles = prompt(SHAPE, [2])
    true = Reference(folder).logits(ids, tiles)
    theirs = Reference(folder, torch.bfloat16, quantization=kind).logits(ids, tiles)
    ours = run(build(folder, kind), ids, tiles)
    far, allowed = ((one - true).square().mean().sqrt() for one in (ours, theirs))
    assert allowed / 1.5 < far < allowed * 1.5


def test_no_layer_of_a_part_outlives_the_one_in_its_place() -> None:
    part = nn.Sequential(*[Linear(32, 32, bias=False) for _ in range(6)])
    alive, held = weakref.WeakSet(list(part)), []

    def note(layer: Linear) -> Linear:
        held.append(len(alive))
        return Fp8Linear(layer, PRODUCTS[0])

    quantize_whole(part, note)
    assert held == [6, 5, 4, 3, 2, 1]


@fp8.needed
def test_a_layer_is_quantised_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a model that fits in eight bits would have to fit in sixteen first."""
    folder = make_checkpoint(tmp_path, shape=Shape(layers=20))
    config, held = load_config(folder), []
    alive, make = weakref.WeakSet[Linear](), Linear.__init__

    def note(layer: Linear, *arguments: Any, **options: Any) -> None:
        make(layer, *arguments, **options)
        alive.add(layer)

    monkeypatch.setattr(Linear, "__init__", note)

    def layers(*_: int) -> None:
        weights = [one.weight for one in alive if type(one) is Linear]
        held.append(sum(weight.shape == (128, 64) and not weight.is_meta for weight in weights))

    build_model(
        config,
        folder,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        quantization="fp8",
        progress=layers,
    )
    assert 0 < max(held) <= 2


@fp8.needed
def test_operations_that_pack_weights_leave_quantised_layers_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, tiles = prompt(SHAPE, [2])
    expected = run(build(folder, "fp8"), ids, tiles)
    monkeypatch.setattr("model.choose", choose)
    found = run(build(folder, "fp8"), ids, tiles)
    # What rounds otherwise in bfloat16 rounds otherwise in float8 too; all else would be far off.
    assert float((found - expected).abs().mean() / expected.std()) < 0.2


@fp8.needed
def test_a_product_that_cannot_be_used_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("needs another device\nmore")

    def shifted(*arguments: Any) -> Tensor:
        return PRODUCTS[0](*arguments).roll(1, 0)

    def use(*products: Callable[..., Tensor]) -> InternVL:
        monkeypatch.setattr("model.quantize.PRODUCTS", products)
        return build(folder, "fp8")

    used = use(fails, shifted, PRODUCTS[1]).decoder.layers[0].mlp.down
    assert isinstance(used, Fp8Linear)
    assert used._product is PRODUCTS[1]
    with pytest.raises(CheckpointError, match="needs another device; it is wrong by"):
        use(fails, shifted)


@fp8.needed
def test_experts_are_quantised_and_the_choice_among_them_is_not(tmp_path: Path) -> None:
    shape = Shape(backbone="Qwen3MoeForCausalLM", text_bias=False, experts=6)
    model = build(make_checkpoint(tmp_path, shape=shape), "fp8")
    mixture = model.decoder.layers[0].mlp
    assert isinstance(mixture, Experts)
    assert not isinstance(mixture.router, Fp8Linear)
    assert all(isinstance(expert.down, Fp8Linear) for expert in mixture.experts)
    ids, tiles = prompt(shape, [2])
    assert bool(run(model, ids, tiles).isfinite().all())


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    odd = make_checkpoint(tmp_path, shape=Shape(mlp=100))
    for kind in ("fp8", "fp8-all", "int8"):
        with pytest.raises(CheckpointError, match=f"{kind} wants .* multiples of 16"):
            build(odd, kind)
    narrow = make_checkpoint(tmp_path / "narrow", shape=Shape(vision_mlp=100))
    with pytest.raises(CheckpointError, match=r"fp8-all wants .* multiples of 16"):
        build(narrow, "fp8-all")
    for kind in ("fp8", "fp8-all"):
        with pytest.raises(ValueError, match=f"{kind} needs a CUDA device"):
            ModelRunner(EngineSettings(model=str(odd), device="cpu", quantization=kind))


@fp8.needed
def test_the_gate_lets_near_answers_through_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "SIZES", ((100, 100),))
    monkeypatch.setattr(quantization, "QUESTIONS", quantization.QUESTIONS[:2])
    out = tmp_path / "result.json"
    command = [str(CHECKPOINT), "--device", "cpu", "--tokens", "4", "--out", str(out)]
    assert quantization.main([*command, "--quantization", "none"]) == 0
    found = json.loads(out.read_text())
    assert (found["divergence"], found["agreement"], found["answers_alike"]) == (0.0, 1.0, 2)
    assert quantization.main(command) == 0
    assert 0 < json.loads(out.read_text())["divergence"] < quantization.MOST_DIVERGENCE

    def coarse(rows: Tensor) -> tuple[Tensor, Tensor]:
        found, scale = to_fp8(rows)
        return (found.float() / 224).round().mul(224).to(found.dtype), scale

    monkeypatch.setattr("model.quantize.to_fp8", coarse)
    assert quantization.main(command) == 1
