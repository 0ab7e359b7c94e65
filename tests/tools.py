"""Programs that are not Python packages; tests/tools.sh installs them."""

import os
import shutil

import pytest

from tests.servers import ROOT


def tool(name: str) -> str:
    """The path of a program. Skips the test where it is not installed, but not in CI."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:{ROOT / '.tools/usr/bin'}")
    if path is None:
        assert not os.environ.get("CI"), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return path
