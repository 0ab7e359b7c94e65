"""Log-probabilities of drawn tokens and of the likeliest ones, for the rows that ask for them.

They are those of the model itself, before any penalty, bias, filter or temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.sampling.base import SampleRow
from model.transfer import to_device, to_host
from wire.messages import TokenLogprobs


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
