"""How long the device took for something: moments in its work, and the time between two."""

import time
from typing import Any

import torch

Moment = Any  # seconds on the host's clock, or a CUDA event


def moment(device: torch.device) -> Moment:
    """This moment on the host, or an event on a device, which nobody has to wait for."""
    if device.type == "cpu":
        return time.perf_counter()
    cuda: Any = torch.cuda
    return cuda.current_stream(device).record_event(cuda.Event(enable_timing=True))


def seconds_between(began: Moment, ended: Moment) -> float:
    """From one moment to a later one on the same device, which must be done with both."""
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended) / 1000)
