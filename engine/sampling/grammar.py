"""The step that holds rows to their grammars."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.grammar import masks
from engine.sampling.base import SampleRow
from model.transfer import to_device


class GrammarMask:
    """Removes every token that the row's grammar does not allow next.

    The masks are made on the host, from tokens that are known, while the device still computes
    the logits; one copy brings those of all rows.
    """

    def needed(self, row: SampleRow) -> bool:
        return row.matcher is not None

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        matchers = [row.matcher for row in rows if row.matcher is not None]
        for row, matcher in zip(rows, matchers, strict=True):
            matcher.advance(row.output)
        octets = to_device(
            masks(matchers).view(np.uint8), logits.device
        )  # bit i & 7 of byte i >> 3
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (octets[:, :, None] >> shifts & 1).flatten(1).bool()
        # The model may know fewer tokens than the tokenizer, or have rows that stand for none.
        allowed = pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]))
        return torch.where(allowed, logits, -torch.inf)
