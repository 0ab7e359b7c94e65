"""Tests of products in float8 on the CPU, which not every torch has: 2.11 does not."""

import pytest
import torch


def works() -> bool:
    """Whether torch does, whatever our code makes of it."""
    rows, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(rows, rows.T, scale, scale.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needed = pytest.mark.skipif(not works(), reason="this torch has no products in float8 on the CPU")
