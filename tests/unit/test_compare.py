"""What ``internvl verify`` makes of answers that no sound model gives."""

import math

import msgspec
import torch

from engine.compare import _difference, _of_logits, _of_token
from wire.cases import Found, Logits, Outcome

FLAT = torch.zeros(2, 5)


def test_logits_that_do_not_vary_are_compared_too() -> None:
    assert _of_logits(_difference(FLAT, FLAT, None)) == []
    for ours in (FLAT + 1, FLAT * math.nan):
        assert len(_of_logits(_difference(ours, FLAT, None))) == 1


def test_what_is_not_a_number_is_out_of_bounds_and_can_be_told() -> None:
    logits = _difference(FLAT + torch.arange(5), FLAT + torch.arange(5), None)
    assert _of_token(3, 0.0, logits) == []
    (wrong,) = _of_token(3, math.nan, logits)
    assert wrong.startswith("greedy: token 3 is another")
    broken = Logits(*[math.nan] * 4)
    outcome = Outcome("text", (0, 0), ([], []), 0, (5, 5), None, broken, 0, 1, math.nan, [wrong])
    told = msgspec.msgpack.encode(Found([outcome], "float32", "none", [], ""))
    back = msgspec.msgpack.decode(told, type=Found).outcomes[0]
    assert back.logits is not None
    assert math.isnan(back.logits.largest)
