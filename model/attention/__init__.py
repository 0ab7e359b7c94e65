"""Attention over the paged cache: the contract, and the choice of an implementation."""

import logging

import torch

from model.attention.base import AttentionBackend
from model.attention.flash import Fa3Attention, FlashAttnAttention, TorchVarlenAttention
from model.attention.flashinfer import FlashInferAttention
from model.attention.native import NativeAttention
from model.attention.sdpa import SdpaAttention
from model.attention.triton_paged import TritonAttention
from model.schema import TextConfig
from wire.knob import SettingError

logger = logging.getLogger(__name__)

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend
    for backend in (
        Fa3Attention,
        FlashAttnAttention,
        TorchVarlenAttention,
        TritonAttention,
        NativeAttention,
        SdpaAttention,
        FlashInferAttention,
    )
}
"""Best first; last, those on request."""


def choose(
    name: str, config: TextConfig, device: torch.device, dtype: torch.dtype, block_size: int
) -> AttentionBackend:
    """The backend called ``name``, or with "auto" the first that supports the model here.

    Raises ValueError with all reasons where none does.
    """
    usual = [each for each, backend in BACKENDS.items() if not backend.on_request]
    names = usual if name == "auto" else [name]
    reasons: list[str] = []
    for candidate in names:
        backend = BACKENDS[candidate](config)
        reason = backend.supports(device, dtype, block_size)
        if reason is None:
            why = "; ".join(reasons) or ("the first choice" if name == "auto" else "asked for")
            # On the CPU most of it is that others need CUDA.
            level = logging.INFO if device.type == "cuda" else logging.DEBUG
            logger.log(level, "attention=%s (%s)", backend.name, why)
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise SettingError("no attention backend can be used: " + "; ".join(reasons))
