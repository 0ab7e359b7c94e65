"""The rules of the house that a machine can check: sizes, names, layers."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("server", "engine", "model", "preprocessing", "wire", "demo")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_or_function_outgrows_the_house(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
            assert statements <= 60, f"{node.name} has {statements} statements"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_package_names_belong_to_this_distribution_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        # Once per place that describes it: an editable install has two.
        assert set(owners[package]) == {"internvl-server"}


def test_no_module_shadows_the_standard_library() -> None:
    names = {*PACKAGES, *(path.stem for path in FILES), *(path.parent.name for path in FILES)}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize(
    "module",
    ["server.app", "server.cli", "preprocessing", "wire", "engine.client", "engine.scheduler"],
)
def test_the_front_end_never_loads_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
