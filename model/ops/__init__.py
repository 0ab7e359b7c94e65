"""What stands between and around the matrix products, fused where a device gains by it."""

import torch

from model import triton as kernels
from model.ops.base import Ops
from model.ops.native import NativeOps

__all__ = ["NativeOps", "Ops", "choose"]


def choose(device: torch.device, dtype: torch.dtype, quantization: str = "none") -> Ops:
    """The fastest implementation for a model of ``dtype`` on ``device``.

    Raises ValueError where ``quantization`` is "int8", which one of them alone has, and it cannot
    be used.
    """
    reason = NativeOps.missing(device, dtype)
    if quantization == "int8" and reason is not None:
        raise ValueError(f"quantization int8 cannot be had: {reason}")
    if kernels.missing(device) is None:
        # Triton takes a while to import, and is not there on every machine.
        from model.ops.triton import TritonOps

        return TritonOps()
    return NativeOps(quantization) if reason is None else Ops()
