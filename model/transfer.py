"""Between the host and the device, without waiting for either.

A copy from ordinary host memory first waits for everything the device still has to do, so what
goes to a device is pinned. On the CPU nothing is copied.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers that the host has, as a tensor on the device; lists of integers become int64."""
    if isinstance(values, np.ndarray) and dtype is None:
        tensor = torch.from_numpy(values)  # several times as fast
    else:
        tensor = torch.as_tensor(values, dtype=dtype, device="cpu")
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def overwrite(target: Tensor, values: np.ndarray) -> None:
    """Put numbers that the host has in the place of those of a tensor of the same shape."""
    source = torch.as_tensor(values, device="cpu")
    target.copy_(source if target.device.type == "cpu" else source.pin_memory(), non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that is complete when the device has come this far."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
