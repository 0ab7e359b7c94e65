"""The steps that change which tokens are likely at all; greedy rows take them too.

The penalties are those of the OpenAI API (presence, frequency: over the output) and of Keskar et
al. 2019, arXiv 1909.05858 (repetition: over prompt and output).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.sampling.base import SampleRow, column, entries
from model.transfer import to_device


class AllowedTokens:
    """Removes every token that is not listed."""

    def needed(self, row: SampleRow) -> bool:
        return bool(row.params.allowed_token_ids)

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        where = entries(logits, [np.array(row.params.allowed_token_ids) for row in rows])
        return torch.full_like(logits, -torch.inf).index_put(where, logits[where])


class BadWords:
    """Removes the last token of a listed sequence when the ones before it were just generated."""

    def needed(self, row: SampleRow) -> bool:
        return bool(row.params.bad_words)

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        return remove(logits, [self._banned(row) for row in rows])

    def _banned(self, row: SampleRow) -> np.ndarray:
        banned = []
        for word in row.params.bad_words:
            head, length = len(word) - 1, row.position
            if head > length or (head and row.output[-1] != word[-2]):
                continue
            if tuple(row.output[length - head :]) == word[:-1]:
                banned.append(word[-1])
        return np.array(banned, dtype=np.int64)


class MinTokens:
    """Removes the stop tokens until enough was generated."""

    def needed(self, row: SampleRow) -> bool:
        return row.position < row.params.min_tokens and bool(row.params.stop_token_ids)

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        return remove(logits, [np.array(row.params.stop_token_ids) for row in rows])


class LogitBias:
    """Adds a number to the logits of listed tokens."""

    def needed(self, row: SampleRow) -> bool:
        return bool(row.params.logit_bias)

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        where = entries(logits, [np.array([t for t, _ in r.params.logit_bias]) for r in rows])
        values = [bias for row in rows for _, bias in row.params.logit_bias]
        added = to_device(values, logits.device, logits.dtype)
        return logits.index_put(where, added, accumulate=True)


class RepetitionPenalty:
    """Divides positive and multiplies negative logits of the tokens that were there already."""

    def needed(self, row: SampleRow) -> bool:
        return row.params.repetition_penalty != 1.0

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        # A token that stands there twice is written twice, with the same value.
        seen = [np.concatenate([row.prompt, row.output]) for row in rows]
        where = entries(logits, seen)
        penalty = column(logits, rows, lambda p: p.repetition_penalty)[where[0], 0]
        old = logits[where]
        return logits.index_put(where, torch.where(old > 0, old / penalty, old * penalty))


class OutputPenalties:
    """Presence (once) and frequency (per occurrence), subtracted from what was generated."""

    def needed(self, row: SampleRow) -> bool:
        params = row.params
        return bool((params.presence_penalty or params.frequency_penalty) and row.position)

    def apply(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        ids, amounts = [], []
        for row in rows:
            tokens, counts = np.unique(row.output, return_counts=True)
            ids.append(tokens)
            amounts.append(row.params.presence_penalty + row.params.frequency_penalty * counts)
        values = to_device(np.concatenate(amounts), logits.device, logits.dtype)
        return logits.index_put(entries(logits, ids), -values, accumulate=True)


def remove(logits: Tensor, ids: Sequence[np.ndarray]) -> Tensor:
    """The logits without the given tokens of each row."""
    return logits.index_put(entries(logits, ids), logits.new_full((), -torch.inf))
