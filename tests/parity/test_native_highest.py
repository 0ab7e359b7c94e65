"""The head that keeps only the highest logit of each row finds what torch finds in all of them."""

import subprocess
import sys

import pytest
import torch

from engine.sampling.sampler import sample_plain
from model.layers import Embedding, Linear
from model.native import LIBRARY, Sketch
from model.ops import NativeOps
from tests.parity.test_native import filled, level, rows

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there was no C compiler")
__all__ = ["level"]  # the fixture


def check_draws(ops: NativeOps, head: Embedding, x: torch.Tensor) -> None:
    """Without the sketch of the head and, if there is one, with it."""
    matrix = ops.matrix(head)
    assert matrix is not None
    expected = sample_plain(ops.logits(head, x))
    for rest in (1, 0) if matrix.sketch else (0,):
        if matrix.sketch:
            Sketch.from_address(matrix.sketch).rest = rest
        assert torch.equal(ops.draw(head, x), expected)


def check_highest(outputs: int, kind: str = "none", *, narrow: bool = False) -> None:
    """Whatever the logits are, the highest is the one that torch finds in them."""
    head = filled(Embedding(outputs, 64))
    head.weight[:] = head.weight[torch.arange(outputs) * 7 % 13 % outputs]  # many are as high
    odd = head.weight[outputs // 2 :: 5]
    for value in (1.0, torch.inf, -torch.inf, torch.nan)[: 4 if kind == "none" else 1]:
        odd[:, 3] = value
        ops = NativeOps(kind, narrow=narrow)
        ops.prepare([head], head)
        for count in (1, 2, 5, 17, 70, 150):
            x = rows(count, 64)
            x[count // 2] = 0
            x[count // 3, 9] = torch.nan
            check_draws(ops, head, x)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("outputs", [1, 13, 16, 33, 64, 333, 1153])
def test_the_highest_logit_is_kept_without_writing_them(
    level: int, outputs: int, kind: str, narrow: bool
) -> None:
    check_highest(outputs, kind, narrow=narrow)


def sketched(weight: torch.Tensor, kind: str = "none") -> tuple[NativeOps, Embedding, Sketch]:
    head = Embedding(*weight.shape)
    head.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    ops = NativeOps(kind, narrow=True)
    ops.prepare([head], head)
    matrix = ops.matrix(head)
    assert matrix is not None
    return ops, head, Sketch.from_address(matrix.sketch)


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-12, 1.0, 1e16, 3e37])
def test_the_sketch_of_a_head_tells_what_need_not_be_computed(
    level: int, scale: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4000, 256, generator=generator)
    weight *= torch.logspace(-3, 1, 4000)[torch.randperm(4000, generator=generator), None]
    ops, head, sketch = sketched(weight, kind)
    for count in range(1, 8):
        x = (torch.randn(count, 256, generator=generator) * scale).bfloat16()
        x[-1, 7] *= 50
        check_draws(ops, head, x)
        assert scale != 1.0 or not sketch.rest  # few were computed


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_outputs_that_a_sketch_cannot_tell_apart_are_computed(level: int, kind: str) -> None:
    """Groups of a hundred outputs that differ by a rounding or two, all over the head."""
    generator = torch.Generator().manual_seed(4)
    alike = torch.randn(20, 256, generator=generator).repeat(100, 1)
    nearly = alike * (1 + torch.randint(-2, 3, alike.shape, generator=generator) * 2.0**-8)
    ops, head, _ = sketched(nearly, kind)
    for seed in range(20):
        x = alike[seed % 20 : seed % 20 + 1] + torch.randn(1, 256, generator=generator)
        check_draws(ops, head, x.bfloat16())


@pytest.mark.parametrize(
    ("kind", "state", "highest", "other"),
    [
        # 0.49 of a step, which the largest weight makes 1, is 0 in six bits; 122 ones are ones.
        ("none", [0, 0] + [1] * 254, [31, 0] + [0.49] * 254, [31, 0] + [1] * 122),
        ("int8", [0, 0] + [1] * 254, [31, 0] + [0.49] * 254, [31, 0] + [1] * 124),
        # 1.5e-5 is less than half a step of what the first number's steps leave of the second.
        ("none", [1, 2.0**-8] + [1.5e-5] * 254, [0, 0] + [1] * 254, [3.6e-3]),
        # What is so small has few digits, or none.
        ("none", [1e-12, 0] + [3e-15] * 254, [0, 0] + [1] * 254, [0.7]),
    ],
    ids=["weights", "whole", "states", "nearly 0"],
)
def test_what_the_sketch_rounds_away_is_reckoned_with(
    level: int, kind: str, state: list[float], highest: list[float], other: list[float]
) -> None:
    """All of it in favour of one output, of which the sketch says that its logit is 0."""
    weight = torch.zeros(4000, 256)
    weight[3000] = torch.tensor(highest)
    weight[1000, : len(other)] = torch.tensor(other)
    ops, head, sketch = sketched(weight, kind)
    x = torch.tensor([state]).bfloat16()
    assert sample_plain(ops.logits(head, x)).tolist() == [3000]
    check_draws(ops, head, x)
    assert not sketch.rest  # few were computed


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("outputs", [1, 17, 4001])
def test_behind_the_last_output_is_none_that_could_be_the_highest(
    level: int, outputs: int, kind: str
) -> None:
    ops, head, _ = sketched(-filled(Embedding(outputs, 64)).weight.abs(), kind)
    check_draws(ops, head, rows(3, 64).abs())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_output_that_is_no_number_is_not_passed_over(level: int, value: float) -> None:
    weight = torch.randn(4000, 256, generator=torch.Generator().manual_seed(5))
    weight[1000] = 0
    weight[1000, 1] = value
    ops, head, sketch = sketched(weight)
    for sign in (1, -1):
        check_draws(ops, head, rows(3, 256) * sign)
        assert sketch.rest == 0


def test_an_output_whose_sums_overflow_on_the_way_is_not_passed_over(level: int) -> None:
    weight = torch.zeros(4000, 256)
    weight[1000, ::200] = torch.tensor([1e21, -1e21])
    weight[2000, 0] = 1e20
    ops, head, _ = sketched(weight)
    for scale in (1e18, 1e17):  # 1e39 - 1e39 is no number there, and 1e38 - 1e38 is 0
        check_draws(ops, head, torch.full((1, 256), scale).bfloat16())


@pytest.mark.parametrize("kind", [Embedding, Linear])
def test_a_head_of_which_nobody_draws_has_no_sketch(kind: type[Embedding] | type[Linear]) -> None:
    for draws in (True, False):
        head = filled(Linear(64, 320, bias=False) if kind is Linear else Embedding(320, 64))
        ops = NativeOps(narrow=True)
        ops.prepare([head], head, draws=draws)
        matrix = ops.matrix(head)
        assert matrix is not None
        assert bool(matrix.sketch) is draws


def test_a_sketch_that_tells_nothing_is_not_read_each_time(level: int) -> None:
    ops, head, sketch = sketched(torch.ones(4000, 64))
    x = rows(2, 64)
    expected = sample_plain(ops.logits(head, x))
    rests = []
    for _ in range(18):
        assert torch.equal(ops.draw(head, x), expected)
        rests.append(sketch.rest)
    # Only AVX512's products read six bits.
    assert rests == ([*range(15, -1, -1), 15, 14] if level == 3 else [0] * 18)


THREADS = """
import torch
from tests.parity.test_native_highest import LIBRARY, check_highest
torch.set_num_threads(1)
for threads in 1, 2, 3, 7:
    assert LIBRARY.internvl_threads(threads) == threads
    for _ in range(2):
        check_highest(1153)
        check_highest(333, narrow=True)
"""


def test_the_highest_is_the_same_whoever_computes_it() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=300)
