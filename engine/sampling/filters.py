"""The steps that leave fewer tokens to draw from. Each touches only the rows that ask for it.

Tokens that are as likely as the last one kept are kept too, so that the outcome never depends on
the order in which equal values were sorted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.sampling.base import SampleRow, column
from model.transfer import to_device

# Below this a temperature is as good as greedy, and dividing by it would overflow.
_COLDEST = 1e-6


class Temperature:
    """Divides by the temperature."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.temperature != 1.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        heat = column(logits, rows, lambda p: max(p.temperature, _COLDEST))
        # With the maximum at zero nothing overflows, however cold.
        return (logits - logits.amax(-1, keepdim=True)) / heat


class TopK:
    """Keeps the k likeliest tokens."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.top_k > 0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        counts = [min(row.params.top_k, logits.shape[-1]) for row in rows]
        best = logits.topk(max(counts), dim=-1).values
        last = to_device(counts, logits.device)[:, None] - 1
        return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


class TopP:
    """Keeps the likeliest tokens until their probabilities reach p; always at least one."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.top_p < 1.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        best = logits.sort(dim=-1, descending=True).values
        shares = best.softmax(-1, dtype=torch.float64)
        before = shares.cumsum(-1) - shares
        kept = before < column(before, rows, lambda p: p.top_p)
        last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
        return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


class MinP:
    """Keeps tokens at least min_p times as likely as the likeliest."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.min_p > 0.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        least = logits.amax(-1, keepdim=True) + column(logits, rows, lambda p: p.min_p).log()
        return logits.masked_fill(logits < least, -torch.inf)
