"""What stands between and around the matrix products, fused where a device gains by it."""

import torch

from model import triton as kernels
from model.ops.base import Ops
from model.ops.native import NativeOps

__all__ = ["NativeOps", "Ops", "choose"]


def choose(device: torch.device, dtype: torch.dtype, quantization: str = "none") -> Ops:
    """The fastest implementation for a model of ``dtype`` on ``device``. ``quantization`` "int8" is
    its own where it is NativeOps, and no implementation's elsewhere."""
    if kernels.missing(device) is None:
        # Triton takes a while to import, and is not there on every machine.
        from model.ops.triton import TritonOps

        return TritonOps()
    return Ops() if NativeOps.missing(device, dtype) else NativeOps(quantization)
