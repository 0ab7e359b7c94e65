"""Lets the kernels run: compiled where there is a CUDA device, else by Triton's interpreter."""

import importlib
import importlib.util
import os
import sys

import pytest
import torch

KERNELS = [
    "model.triton.experts",
    "model.triton.float8",
    "model.triton.fused",
    "model.triton.int4",
    "model.triton.paged",
    "model.triton.pixels",
    "model.triton.quantize",
    "engine.sampling.fused",
]

if importlib.util.find_spec("triton") is None:
    assert not os.environ.get("CI"), "triton is missing"
    collect_ignore_glob = ["test_*.py"]
elif not torch.cuda.is_available():
    # Asked for when triton and the kernels are imported, and below when they run. What other tests
    # start must not inherit it.
    assert "triton" not in sys.modules, "something collected before this folder imports triton"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in KERNELS:
            importlib.import_module(module)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
