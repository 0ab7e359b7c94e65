"""Attention over the paged cache: the contract, and the choice of an implementation."""

import torch

from model.attention.base import AttentionBackend
from model.attention.sdpa import SdpaAttention
from model.schema import TextConfig

BACKENDS: dict[str, type[AttentionBackend]] = {"sdpa": SdpaAttention}


def choose(
    name: str, config: TextConfig, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend called ``name``, or with "auto" the first that supports the model here."""
    names = list(BACKENDS) if name == "auto" else [name]
    reasons = []
    for candidate in names:
        backend = BACKENDS[candidate](config)
        reason = backend.supports(device, dtype)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise ValueError("no attention backend can be used: " + "; ".join(reasons))
