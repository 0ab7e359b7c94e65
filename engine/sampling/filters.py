"""The steps that leave fewer tokens to draw from. Each touches only the rows that ask for it.

Tokens that are as likely as the last one kept are kept too, so that the outcome never depends on
the order in which equal values were sorted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.sampling.base import SampleRow, column
from model.transfer import to_device

# Below this a temperature is as good as greedy, and dividing by it would overflow.
COLDEST = 1e-6
# Tokens among which top-p looks first on the CPU.
_LIKELIEST = 1024
_PIECE = 512


class Temperature:
    """Divides by the temperature."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.temperature != 1.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        heat = column(logits, rows, lambda p: max(p.temperature, COLDEST))
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
        return _keep(logits, logits >= best.gather(-1, last))


class TopP:
    """Keeps the likeliest tokens until their probabilities reach p; always at least one."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.top_p < 1.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        share = (logits - logits.amax(-1, keepdim=True)).exp()
        total = _sum(share)
        wanted = total * column(total, rows, lambda p: p.top_p)
        count = logits.shape[-1]
        if logits.device.type == "cpu" and count > _LIKELIEST:
            # Nearly always a few tokens reach p, and finding those is a tenth of sorting all.
            least, reached = self._least(logits, share, wanted, _LIKELIEST)
            if bool(reached.all()):
                return _keep(logits, logits >= least)
        least, _ = self._least(logits, share, wanted, count)
        return _keep(logits, logits >= least)

    def _least(
        self, logits: Tensor, share: Tensor, wanted: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The last logit kept, [R, 1], if it is among the ``count`` highest, and whether it is."""
        best, order = logits.topk(count, dim=-1)
        shares = share.gather(-1, order).double()
        until = shares.cumsum(-1)
        last = (until - shares < wanted).sum(-1, keepdim=True).clamp(min=1) - 1
        return best.gather(-1, last), until[:, -1:] >= wanted


class MinP:
    """Keeps tokens at least min_p times as likely as the likeliest."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.min_p > 0.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        least = logits.amax(-1, keepdim=True) + column(logits, rows, lambda p: p.min_p).log()
        return _keep(logits, logits >= least)


def _sum(values: Tensor) -> Tensor:
    """Sums of rows, ``[R, 1]`` float64, equal in every batch: a piece is summed by one thread."""
    pieces = pad(values, (0, -values.shape[-1] % _PIECE)).unflatten(-1, (-1, _PIECE))
    return pieces.sum(-1).sum(-1, keepdim=True, dtype=torch.float64)


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    # On the CPU ten times as fast as masked_fill.
    return torch.where(kept, logits, -torch.inf)
