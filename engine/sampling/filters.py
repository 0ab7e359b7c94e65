"""The steps between logits and the draw. Each touches only the rows that ask for it.

Tokens that are as likely as the last one kept are kept too, so that the outcome never depends on
the order in which equal values were sorted.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wire.sampling import SamplingParams

# Below this a temperature is as good as greedy, and dividing by it would overflow.
_COLDEST = 1e-6


class Step(Protocol):
    """One step of the sampler."""

    def needed(self, params: SamplingParams) -> bool:
        """Whether a row with these parameters is changed at all."""

    def apply(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """fp32 logits ``[R, V]`` of rows that need it, to logits with removed tokens at -inf."""


class Temperature:
    """Divides by the temperature."""

    def needed(self, params: SamplingParams) -> bool:
        return params.temperature != 1.0

    def apply(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        heat = _column(logits, params, lambda p: max(p.temperature, _COLDEST))
        # With the maximum at zero nothing overflows, however cold.
        return (logits - logits.amax(-1, keepdim=True)) / heat


class TopK:
    """Keeps the k likeliest tokens."""

    def needed(self, params: SamplingParams) -> bool:
        return params.top_k > 0

    def apply(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        counts = [min(p.top_k, logits.shape[-1]) for p in params]
        best = logits.topk(max(counts), dim=-1).values
        last = torch.tensor(counts, device=logits.device)[:, None] - 1
        return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


class TopP:
    """Keeps the likeliest tokens until their probabilities reach p; always at least one."""

    def needed(self, params: SamplingParams) -> bool:
        return params.top_p < 1.0

    def apply(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        best = logits.sort(dim=-1, descending=True).values
        shares = best.softmax(-1, dtype=torch.float64)
        before = shares.cumsum(-1) - shares
        kept = before < _column(before, params, lambda p: p.top_p)
        last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
        return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


class MinP:
    """Keeps tokens at least min_p times as likely as the likeliest."""

    def needed(self, params: SamplingParams) -> bool:
        return params.min_p > 0.0

    def apply(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        least = logits.amax(-1, keepdim=True) + _column(logits, params, lambda p: p.min_p).log()
        return logits.masked_fill(logits < least, -torch.inf)


def _column(
    like: Tensor, params: Sequence[SamplingParams], value: Callable[[SamplingParams], float]
) -> Tensor:
    values = [value(p) for p in params]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
