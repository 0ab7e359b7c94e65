"""The likeliest token of each row of logits."""

import torch
from torch import Tensor

from model.native import LIBRARY


def highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row of fp32 logits ``[R, V]``, and its place: the first of those that are
    as high, or the first NaN."""
    if logits.device.type != "cpu":
        best, places = logits.max(dim=-1)
        return best, places
    if LIBRARY is None or logits.stride(-1) != 1:
        # Much faster than torch's maximum with its place.
        places = torch.from_numpy(logits.numpy().argmax(-1))
        return logits.gather(-1, places[:, None])[:, 0], places
    rows, count = logits.shape
    best, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    LIBRARY.internvl_highest(
        logits.data_ptr(), logits.stride(0), rows, count, places.data_ptr(), best.data_ptr()
    )
    return best, places
