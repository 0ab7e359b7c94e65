"""The head that keeps only the highest logit of each row finds what torch finds in all of them."""

import subprocess
import sys

import pytest
import torch

from engine.sampling.sampler import sample_plain
from model.layers import Embedding
from model.native import LIBRARY
from model.ops import NativeOps
from tests.parity.test_native import filled, level, rows

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there was no C compiler")
__all__ = ["level"]  # the fixture


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
            logits = ops.logits(head, x)
            tokens = torch.empty(count, dtype=torch.int64)
            matrix = ops.matrix(head)
            memory = torch.empty(LIBRARY.internvl_linear_scratch(matrix, count), dtype=torch.uint8)
            pointers = tokens.data_ptr(), memory.data_ptr()
            LIBRARY.internvl_linear_highest(matrix, x.data_ptr(), x.stride(0), count, *pointers)
            assert torch.equal(tokens, sample_plain(logits))


@pytest.mark.parametrize(("kind", "narrow"), [("none", False), ("none", True), ("int8", False)])
@pytest.mark.parametrize("outputs", [1, 13, 16, 33, 64, 333, 1153])
def test_the_highest_logit_is_kept_without_writing_them(
    level: int, outputs: int, kind: str, narrow: bool
) -> None:
    check_highest(outputs, kind, narrow=narrow)


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
