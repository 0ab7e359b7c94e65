"""The C for the CPU computes what the formulas say, with every instruction set of this machine, and
a row's result is the same, bit for bit, whatever is computed beside it."""

import dataclasses
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.rows import Rows
from model.attention import choose
from model.attention.native import NativeAttention
from model.decoder import Decoder
from model.internvl import InternVL
from model.layers import Embedding, LayerNorm, Linear, RMSNorm
from model.native import BEST, LIBRARY
from model.ops import NativeOps, Ops
from model.ops import choose as choose_ops
from model.single import SingleTokens
from tests.checkpoints import Shape, make_checkpoint
from tests.parity import test_scheduled, test_v2pe
from tests.parity.test_attention import BATCHES, config, expected_and_found
from wire.messages import EngineRequest
from wire.sampling import SamplingParams

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there was no C compiler")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
# A rounding to bf16 is off by 2^-9 of the value at most.
ROUNDING = 2.0**-8
# The shares of an attention are rounded to bf16 before they are multiplied with values around 1.
SHARES = 8e-3
# A number half way between two may be rounded to either.
QUANTISED = 2e-2
LEVELS = range(1, (LIBRARY.internvl_choose(BEST) if LIBRARY else 0) + 1)
SHAPE = Shape(
    vision_size=64, vision_heads=2, size=64, heads=4, kv_heads=2, head_dim=32, vocab=200 + 312
)


QWEN3 = dataclasses.replace(SHAPE, backbone="Qwen3ForCausalLM", text_bias=False)
MIXTURE = dataclasses.replace(
    QWEN3, backbone="Qwen3MoeForCausalLM", experts=6, expert_mlp=64, dense_layers=(1,)
)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of the instruction sets: 1 is portable C."""
    assert LIBRARY.internvl_choose(request.param) == request.param
    LIBRARY.internvl_threads(2)
    yield request.param
    LIBRARY.internvl_choose(BEST)


def filled(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, part in layer.named_parameters():
        values = torch.randn(part.shape, generator=generator) / part.shape[-1] ** 0.5
        setattr(layer, name, torch.nn.Parameter(values.to(BF16), requires_grad=False))
    return layer


class Gated(torch.nn.Module):
    """A module with gates, as a layer of the decoder is."""

    def __init__(self, gate_up: Linear) -> None:
        super().__init__()
        self.gate_up = gate_up


def prepared(
    *layers: torch.nn.Module, quantization: str = "none", narrow: bool = False
) -> NativeOps:
    ops = NativeOps(quantization, narrow=narrow)
    parts = [part for layer in layers for part in layer.modules()]
    ops.prepare(parts, Embedding(0, 1), set(parts))
    return ops


def rounded(rows: Tensor) -> Tensor:
    """Every row as the nearest of 255 evenly spread numbers, float64."""
    wide = rows.double()
    step = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / step).round() * step


def rows(count: int, size: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(count)).to(BF16)


def close(found: Tensor, expected: Tensor, atol: float = 2e-3) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=ROUNDING, atol=atol)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(32, 16), (64, 40), (96, 65), (1056, 33), (128, 512)]
)
def test_products_equal_the_formula(level: int, inputs: int, outputs: int, narrow: bool) -> None:
    layer = filled(Linear(inputs, outputs, bias=True))
    weight, bias = layer.weight.double(), layer.bias.double()
    ops = prepared(layer, narrow=narrow)
    for count in (1, 2, 3, 7, 12, 15, 16, 17, 24, 25, 28, 29, 33, 70, 150, 260):
        x = rows(count, inputs)
        expected = x.double() @ weight.T + bias
        close(ops.linear(layer, x), expected)
        close(ops.linear_gelu(layer, x), torch.nn.functional.gelu(expected))


@pytest.mark.parametrize("count", [1, 20, 30, 200, 528])
def test_twelve_bits_say_every_weight(level: int, count: int) -> None:
    """Products with ones are the weights themselves: near to each other, zeros, and odd ones."""
    layer = filled(Linear(1056, 40, bias=False))
    weight = layer.weight.detach()
    weight[0, 0], weight[5, 1000] = 3e38, -1e-30
    weight[16:32, 7], weight[39, 1055], weight[38, 3] = 0, -7e7, -0.0
    expected = weight.clone()
    ops = prepared(layer, narrow=True)
    packed = ops.matrix(layer)
    assert packed is not None
    assert packed.bases
    found = torch.cat(
        [ops.linear(layer, x).clone() for x in torch.eye(1056, dtype=BF16).split(count)]
    )
    assert torch.equal(found, expected.T)


def test_twelve_bits_are_not_taken_where_many_weights_need_more(level: int) -> None:
    layer = filled(Linear(64, 48, bias=False))
    layer.weight.detach()[3] *= 2.0 ** torch.arange(-64, 64, 2)
    expected = rows(5, 64).double() @ layer.weight.double().T
    ops = prepared(layer, narrow=True)
    packed = ops.matrix(layer)
    assert packed is not None
    assert not packed.bases
    torch.testing.assert_close(
        ops.linear(layer, rows(5, 64)).double(), expected, rtol=ROUNDING, atol=1e-2
    )


@pytest.mark.parametrize("weights", ["none", "narrow", "int8"])
def test_a_product_depends_on_its_own_row_alone(level: int, weights: str) -> None:
    layer = filled(Linear(1088, 96, bias=True))
    layer.weight.detach()[7, 9] = 1e5
    narrow = weights == "narrow"
    ops = prepared(layer, quantization="none" if narrow else weights, narrow=narrow)
    x = rows(500, 1088)
    whole = ops.linear(layer, x).clone()
    for count in (*range(16), 23, 25, 32, 40, 70, 130, 241, 490):
        assert torch.equal(ops.linear(layer, x[:count]), whole[:count])
        assert torch.equal(ops.linear(layer, x[500 - count :]), whole[500 - count :])


@pytest.mark.parametrize("narrow", [False, True])
def test_gates_stand_beside_what_they_let_through(level: int, narrow: bool) -> None:
    layer = filled(Linear(64, 2 * 48, bias=False))
    gate, up = layer.weight.double().chunk(2)
    ops = prepared(Gated(layer), narrow=narrow)
    x = rows(19, 64) * 4
    expected = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
    close(ops.gate_up(layer, x), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (128, 65), (1088, 33), (192, 512)])
def test_quantised_products_equal_the_formula(level: int, inputs: int, outputs: int) -> None:
    layer, gates = (
        filled(Linear(inputs, outputs, bias=True)),
        filled(Linear(inputs, 96, bias=False)),
    )
    weight, bias = rounded(layer.weight), layer.bias.double()
    gate, up = rounded(gates.weight).chunk(2)
    ops = prepared(layer, Gated(gates), quantization="int8")
    for count in (1, 2, 15, 16, 17, 33, 70, 150):
        x = rows(count, inputs)
        expected = rounded(x) @ weight.T + bias
        close(ops.linear(layer, x), expected, QUANTISED)
        close(ops.linear_gelu(layer, x), torch.nn.functional.gelu(expected), QUANTISED)
        expected = torch.nn.functional.silu(rounded(x) @ gate.T) * (rounded(x) @ up.T)
        close(ops.gate_up(gates, x), expected, QUANTISED)


def test_the_ends_of_what_is_quantised(level: int) -> None:
    """Nothing overflows, zeros stay zeros, and what is not a number does not become one."""
    layer = Linear(1024, 16, bias=False)
    layer.weight = torch.nn.Parameter(torch.full((16, 1024), -1.0, dtype=BF16), requires_grad=False)
    ops = prepared(layer, quantization="int8")
    x = torch.full((3, 1024), 3e4, dtype=BF16)
    x[1], x[2, 5] = 0, torch.nan
    found = ops.linear(layer, x)
    close(found[:2], x[:2].double() @ torch.full((1024, 16), -1.0).double())
    assert found[2].isnan().all()


@pytest.mark.parametrize("kind", [Embedding, Linear])
def test_logits_are_not_rounded(level: int, kind: type[Embedding] | type[Linear]) -> None:
    head = filled(Linear(64, 333, bias=False) if kind is Linear else Embedding(333, 64))
    weight = head.weight.double()
    ops = NativeOps()
    ops.prepare([head], head)
    x = rows(5, 64)
    found = ops.logits(head, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_sums_and_norms_equal_the_formula(kind: type[LayerNorm] | type[RMSNorm]) -> None:
    norm = filled(kind(96, 1e-6))
    ops = prepared(norm)
    # Large beside its spread: the mean of squares alone would lose it.
    hidden, delta = rows(37, 96) + 100, rows(38, 96)[:37]
    summed = (hidden.double() + delta.double()).to(BF16)
    wide = summed.double()
    if kind is LayerNorm:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    if kind is LayerNorm:
        wide = wide + norm.bias.double()
    close(ops.norm(summed.clone(), norm), wide)
    added, normed = ops.add_norm(hidden.clone(), delta, norm)
    assert torch.equal(added, summed)
    close(normed, wide)


@pytest.mark.parametrize(
    ("patches", "heads", "head"), [(1, 1, 32), (17, 2, 64), (300, 2, 128), (1100, 1, 32)]
)
def test_attention_in_a_tile(level: int, patches: int, heads: int, head: int) -> None:
    qkv = rows(2 * patches, 3 * heads * head).view(2, patches, -1)
    found = NativeOps().vision_attention(qkv, heads, None, None)
    close(found, Ops().vision_attention(qkv.double(), heads, None, None), SHARES)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size"),
    [(4, 4, 32), (7, 1, 256), (14, 2, 64), (4, 2, 96), (4, 2, 160)],
)
def test_paged_attention(name: str, heads: int, kv_heads: int, block_size: int) -> None:
    LIBRARY.internvl_choose(BEST)
    backend = NativeAttention(dataclasses.replace(config(heads, kv_heads), head_dim=64))
    expected, found = expected_and_found(backend, BATCHES[name], block_size, BF16)
    close(found, expected, SHARES)


def test_paged_attention_everywhere(level: int) -> None:
    backend = NativeAttention(dataclasses.replace(config(14, 2), head_dim=64))
    expected, found = expected_and_found(backend, BATCHES["everything at once"], 32, BF16)
    close(found, expected, SHARES)


def test_a_row_is_the_same_in_every_batch(level: int) -> None:
    layer, norm = filled(Linear(96, 80, bias=True)), filled(RMSNorm(96, 1e-6))
    ops = prepared(layer, norm)
    x = rows(70, 96)
    together = ops.linear(layer, ops.norm(x, norm)).clone()
    for start, end in ((0, 1), (3, 20), (7, 70), (69, 70)):
        alone = ops.linear(layer, ops.norm(x[start:end].clone(), norm))
        assert torch.equal(alone, together[start:end])


LATER = """
import ctypes, sys
import numpy as np
from model.native import LIBRARY as library

p, l = ctypes.c_void_p, ctypes.c_long
library.internvl_pack.argtypes = [p, l, l, p, l]
weights = np.arange(64 * 32, dtype=np.uint16)
def packed():
    panels = np.zeros_like(weights)
    library.internvl_pack(weights.ctypes.data, 64, 32, panels.ctypes.data, 0)
    return panels
alone = packed()
for threads in 2, 4:
    library.internvl_threads(threads)
    for _ in range(200):
        assert (packed() == alone).all()
"""


def test_threads_that_are_made_later_take_no_part_in_what_was() -> None:
    command = [sys.executable, "-c", LATER]
    subprocess.run(command, check=True, timeout=300)  # a pool that miscounts waits for ever


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("native"), shape=SHAPE, dtype=BF16)


def serve(folder: Path, batches: list[list], **settings: object) -> dict[str, list[int]]:
    settings = {"dtype": "bfloat16", "block_size": 32, "threads": 2} | settings
    tokens, core = test_scheduled.run(folder, batches, **settings)
    assert core._runner.ready().attention == "native"
    return tokens


@pytest.mark.parametrize(("mode", "kind"), [("off", "none"), ("on", "none"), ("off", "int8")])
def test_tokens_do_not_depend_on_how_they_are_served(
    folder: Path, level: int, mode: str, kind: str
) -> None:
    requests = test_scheduled.requests()
    how = {"async_scheduling": mode, "quantization": kind}
    single = {"enable_prefix_caching": False, "speculative_tokens": 0}
    alone = serve(folder, [[r] for r in requests], quantization=kind, **single)
    assert len({tuple(row) for row in alone.values()}) == len(requests)
    assert serve(folder, [requests], **how) == alone
    cramped = {"max_num_batched_tokens": 7, "num_kv_blocks": 6, "max_num_seqs": 5}
    assert serve(folder, [requests], **how, **cramped) == alone
    together, again = [*requests, *test_scheduled.renamed("twin")], test_scheduled.renamed("again")
    tokens = serve(folder, [together, again], **how)
    assert tokens == {
        when + name: row for when in ("", "twin ", "again ") for name, row in alone.items()
    }


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_no_step_writes_behind_its_scratch(
    folder: Path, level: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where many rows come in, and some leave the last layer, so that it has another way."""
    guarded = []

    def guard(memory: Tensor, count: int) -> Tensor:
        guarded.append((torch.full((count + 2**17,), 7, dtype=BF16), count))
        return guarded[-1][0][:count]

    monkeypatch.setattr("model.attention.native.grown", guard)
    monkeypatch.setattr("model.single.scratch", lambda count: guard(rows(0, 0), count))
    sampling = SamplingParams(max_tokens=2)
    long = [EngineRequest(f"{n}", [n] * 60, sampling) for n in range(4)]
    serve(folder, [[(request, []) for request in long]], quantization=kind, max_num_seqs=4)
    assert len(guarded) > 1
    assert all((memory[count:] == 7).all() for memory, count in guarded)


@pytest.mark.parametrize("shape", [QWEN3, MIXTURE], ids=["Qwen3", "mixture of experts"])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_nor_do_those_of_other_decoders(shape: Shape, kind: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shape=shape, dtype=BF16)
    requests = test_scheduled.requests()
    alone = serve(folder, [[r] for r in requests], quantization=kind)
    assert len({tuple(row) for row in alone.values()}) == len(requests)
    assert serve(folder, [requests], quantization=kind) == alone
    cramped = {"max_num_batched_tokens": 7, "num_kv_blocks": 6, "max_num_seqs": 5}
    assert serve(folder, [requests], quantization=kind, **cramped) == alone
    # Alone, most steps of a prompt draw nothing.
    assert serve(folder, [[r] for r in requests], quantization=kind, **cramped) == alone


@pytest.mark.parametrize("shape", [SHAPE, QWEN3], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_layers_in_one_call_equal_them_piece_by_piece(
    shape: Shape, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, shape=shape, dtype=BF16)
    wholes, pieces = [], []
    through, forward = NativeAttention.through, Decoder.forward

    def first_whole(
        self: NativeAttention, layers: object, norm: object, hidden: Tensor, *rest: object
    ) -> None:
        whole = through(self, layers, norm, hidden.clone(), *rest)
        assert whole is not None
        wholes.append(whole)

    def then_in_pieces(*arguments: object) -> Tensor:
        pieces.append(forward(*arguments).clone())
        return pieces[-1]

    monkeypatch.setattr(NativeAttention, "through", first_whole)
    monkeypatch.setattr(Decoder, "forward", then_in_pieces)
    serve(folder, [test_scheduled.requests()], quantization=kind, max_num_batched_tokens=40)
    assert len({len(whole) for whole in wholes}) > 3  # steps of several sizes
    for whole, piece in zip(wholes, pieces, strict=True):
        assert torch.equal(whole, piece)


@pytest.mark.parametrize("shape", [SHAPE, QWEN3], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_steps_of_single_tokens_in_one_call_have_the_logits_and_tokens_of_others(
    shape: Shape, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind pictures of any positions, over blocks that changed their owner, and of tokens that
    the step before draws."""
    folder = make_checkpoint(tmp_path, shape=shape, dtype=BF16)
    how = {"async_scheduling": mode, "num_kv_blocks": 6, "max_num_seqs": 5}
    logits: list[Tensor] = []
    sizes: set[tuple[int, bool]] = set()
    compute, call = InternVL.logits, SingleTokens._call

    def keep(model: InternVL, hidden: Tensor) -> Tensor:
        logits.append(compute(model, hidden).clone())
        return logits[-1]

    def note(single: SingleTokens, inputs: "array[int]", tokens: int | None) -> None:
        sizes.add((len(inputs) // 4, tokens is not None))
        call(single, inputs, tokens)

    monkeypatch.setattr(InternVL, "logits", keep)
    monkeypatch.setattr(SingleTokens, "_call", note)
    tokens = serve(folder, [test_v2pe.stepped(None)], **how)
    assert len(sizes) > 2
    assert {drawn for count, drawn in sizes if count > 1} == {True}
    logits.clear()
    sizes.clear()
    monkeypatch.setattr(Rows, "are_greedy", lambda *_: False)
    assert serve(folder, [test_v2pe.stepped(None)], **how) == tokens
    assert len(sizes) > 2
    assert {drawn for count, drawn in sizes if count > 1} == {False}
    found, logits = logits, []
    sizes.clear()
    monkeypatch.setattr("engine.runner.single_tokens", lambda *_: None)
    assert serve(folder, [test_v2pe.stepped(None)], **how) == tokens
    assert not sizes
    assert len(found) > test_v2pe.COUNT
    for one, other in zip(found, logits, strict=True):
        assert torch.equal(one, other)


def test_norms_of_heads_equal_the_formula(level: int) -> None:
    q_norm, k_norm = (filled(RMSNorm(48, 1e-6), seed) for seed in (1, 2))
    for count in (1, 7):
        wide = rows(count, 6 * 48 + 32)
        beyond, heads = wide[:, 6 * 48 :].clone(), wide[:, : 6 * 48].double().unflatten(1, (6, 48))
        scale = (heads[:, :5].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        weights = torch.stack([norm.weight.double() for norm in 3 * [q_norm] + 2 * [k_norm]])
        expected = torch.cat((heads[:, :5] * scale * weights, heads[:, 5:]), dim=1).flatten(1)
        found = prepared(q_norm, k_norm).head_norms(wide[:, : 6 * 48], (3, 2, 1), q_norm, k_norm)
        close(found, expected)
        assert torch.equal(wide[:, 6 * 48 :], beyond)


def test_whatever_the_c_cannot_compute_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, small = filled(Linear(20, 24, bias=True)), filled(RMSNorm(20, 1e-6))
    ops = prepared(odd, small)
    x = rows(3, 20)
    assert torch.equal(ops.linear(odd, x), Ops().linear(odd, x))
    assert torch.equal(ops.norm(x, small), Ops().norm(x, small))
    gates = filled(Linear(64, 2 * 24, bias=False))
    x = rows(3, 64)
    expected = Ops().gate_up(gates, x)
    assert torch.equal(prepared(Gated(gates)).gate_up(gates, x), expected)
    text = dataclasses.replace(config(4, 2), head_dim=64)
    assert choose("auto", text, CPU, BF16, 64).name == "native"
    assert choose("auto", text, CPU, BF16, 48).name == "sdpa"
    assert choose("auto", text, CPU, torch.float32, 64).name == "sdpa"
    assert choose("auto", dataclasses.replace(text, head_dim=80), CPU, BF16, 64).name == "sdpa"
    monkeypatch.setattr("model.ops.native.LIBRARY", None)
    assert choose_ops(CPU, BF16).name == "torch"
    assert choose("auto", text, CPU, BF16, 64).name == "sdpa"
