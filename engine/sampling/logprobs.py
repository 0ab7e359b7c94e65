"""Log-probabilities of drawn tokens, of tokens of a prompt, and of the likeliest in their place,
for the rows that ask for them.

They are those of the model itself, before any penalty, bias, filter or temperature.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.sampling.base import SampleRow
from model.transfer import to_device, to_host
from wire.messages import PromptLogprobs, TokenLogprobs


@dataclass(frozen=True)
class Likely:
    """What was found for the rows ``asking``, A of them."""

    asking: list[int]
    counts: list[int]
    drawn: Tensor  # [A] fp32
    values: Tensor  # [A, K] fp32
    ids: Tensor  # [A, K] int64

    def to_host(self) -> "Likely":
        """The same on the host, in a while; see ``model.transfer``."""
        found = (to_host(tensor) for tensor in (self.drawn, self.values, self.ids))
        return Likely(self.asking, self.counts, *found)

    def read(self, rows: int) -> list[TokenLogprobs | None]:
        """One entry per row; None where it was not asked for."""
        found: list[TokenLogprobs | None] = [None] * rows
        likeliest = zip(self.ids.tolist(), self.values.tolist(), strict=True)
        for row, count, own, (names, best) in zip(
            self.asking, self.counts, self.drawn.tolist(), likeliest, strict=True
        ):
            found[row] = TokenLogprobs(own, list(zip(names[:count], best[:count], strict=True)))
        return found


def logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[SampleRow]) -> Likely | None:
    """Of the tokens ``[R]`` drawn from fp32 logits ``[R, V]``; None if no row asks."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs >= 0]
    if not asking:
        return None
    counts = [rows[i].params.logprobs for i in asking]
    index = to_device(asking, logits.device)
    likely = logits[index].log_softmax(-1)
    drawn = likely.gather(-1, tokens[index, None].clamp(min=0))[:, 0]
    values, ids = likely.topk(min(max(counts), logits.shape[-1]), dim=-1)
    return Likely(asking, counts, drawn, values, ids)


class Part(NamedTuple):
    """One piece of work: how many tokens, how many of the likeliest to name beside each, or which
    ``names`` instead."""

    length: int
    likeliest: int
    names: tuple[int, ...] = ()


def asked(row: SampleRow, start: int, hidden: Tensor) -> tuple[Part, np.ndarray, Tensor]:
    """What ``row`` asks of the positions of its prompt from ``start`` on, which have the states
    ``hidden`` [T, H]: the tokens [M] that follow those it asks about, and the states [M, H] of
    these."""
    following = row.prompt[start + 1 : start + 1 + len(hidden)]
    lookup = row.params.lookup
    if lookup is None:
        part = Part(len(following), row.params.prompt_logprobs)
        return part, following, hidden[: len(following)]
    at = [position - start for position in lookup.at if 0 <= position - start < len(following)]
    return Part(len(at), 0, lookup.ids), following[at], hidden[to_device(at, hidden.device)]


@dataclass(frozen=True)
class Scored:
    """M tokens of prompts, in ``parts``. The last columns are for what these name."""

    parts: list[Part]
    own: Tensor  # [M] fp32
    ranks: Tensor  # [M] int64
    values: Tensor  # [M, K] fp32
    ids: Tensor  # [M, K] int64

    def to_host(self) -> "Scored":
        """The same on the host, in a while; see ``model.transfer``."""
        found = (to_host(tensor) for tensor in (self.own, self.ranks, self.values, self.ids))
        return Scored(self.parts, *found)

    def read(self) -> list[list[PromptLogprobs]]:
        """The entries of each piece of work."""
        lines = (tensor.tolist() for tensor in (self.own, self.ranks, self.values, self.ids))
        entries = zip(*lines, strict=True)
        likeliest = self.ids.shape[1] - max(len(part.names) for part in self.parts)
        found = []
        for count, most, names in self.parts:
            shown = slice(likeliest, likeliest + len(names)) if names else slice(most)
            found.append(
                [
                    PromptLogprobs(own, rank, list(zip(ids[shown], best[shown], strict=True)))
                    for own, rank, best, ids in itertools.islice(entries, count)
                ]
            )
        return found


def score(
    to_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    parts: list[Part],
    at_once: int = 64,
) -> Scored:
    """Look ``tokens`` [M] up in the logits of the positions before them, ``hidden`` [M, H].

    The logits are made of ``at_once`` rows at a time, whatever M is.
    """
    most = max(part.likeliest for part in parts)
    width = max(len(part.names) for part in parts)
    named = tokens.new_empty(len(tokens), 0)
    if width:
        padded = [[(*part.names, *[0] * (width - len(part.names)))] * part.length for part in parts]
        named = to_device(list(itertools.chain(*padded)), hidden.device)
    found = []
    for rows, wanted, names in zip(
        hidden.split(at_once), tokens.split(at_once), named.split(at_once), strict=True
    ):
        logits = to_logits(rows)
        total = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(-1, wanted[:, None])
        values, ids = logits.topk(min(most, logits.shape[-1]), dim=-1)
        values = torch.cat([values, logits.gather(-1, names)], dim=-1)
        ids = torch.cat([ids, names], dim=-1)
        found.append(((own - total)[:, 0], (logits >= own).sum(-1), values - total, ids))
    return Scored(parts, *(torch.cat(tensors) for tensors in zip(*found, strict=True)))
