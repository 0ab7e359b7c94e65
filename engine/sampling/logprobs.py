"""Log-probabilities of drawn tokens and of the likeliest ones, for the rows that ask for them.

They are those of the model itself, before any penalty, bias, filter or temperature.
"""

from collections.abc import Sequence

from torch import Tensor

from engine.sampling.base import SampleRow
from wire.messages import TokenLogprobs


def logprobs(
    logits: Tensor, tokens: Sequence[int | None], rows: Sequence[SampleRow]
) -> list[TokenLogprobs | None]:
    """One entry per row of fp32 logits ``[R, V]``; None where it was not asked for."""
    found: list[TokenLogprobs | None] = [None] * len(rows)
    asking = [
        (i, token)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.params.logprobs >= 0 and token is not None
    ]
    if not asking:
        return found
    likely = logits[[i for i, _ in asking]].log_softmax(-1)
    drawn = likely[range(len(asking)), [token for _, token in asking]].tolist()
    most = min(max(rows[i].params.logprobs for i, _ in asking), logits.shape[-1])
    values, ids = likely.topk(most, dim=-1)
    for (i, _), own, best, names in zip(asking, drawn, values.tolist(), ids.tolist(), strict=True):
        count = rows[i].params.logprobs
        found[i] = TokenLogprobs(own, list(zip(names[:count], best[:count], strict=True)))
    return found
