"""``internvl verify``: the real command, on models that are what transformers computes and on one
that is not."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo import CHECKPOINT
from tests.checkpoints import SIX_B_LIKE, Shape, Tensors, in_four_bits, make_checkpoint
from tests.servers import ROOT

CASES = ("text", "picture", "wide picture", "two pictures", "frames")


def verify(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    # Small, and nothing to measure first.
    settings = ("--max-num-seqs", "1", "--num-kv-blocks", "16", "--step-budget-ms", "0")
    return subprocess.run(
        [sys.executable, "-m", "server", "verify", str(folder), *settings, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def wrong(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What is told to be out of bounds."""
    lines = done.stdout.splitlines()
    return [line.removeprefix("WRONG  ") for line in lines if line.startswith("WRONG")]


def test_the_demo_model_is_what_transformers_computes(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    done = verify(CHECKPOINT, "--out", str(out), "--tokens", "4")
    assert (done.returncode, wrong(done)) == (0, []), done.stderr
    assert "All in bounds." in done.stdout
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    outcomes = {outcome["name"]: outcome for outcome in found["outcomes"]}
    assert set(CASES) < set(outcomes)
    for name, outcome in outcomes.items():
        assert outcome["tiles"][0] == outcome["tiles"][1]
        assert outcome["pixels"] == 0
        assert (outcome["logits"] is not None) == (name in CASES)
    assert outcomes["two pictures"]["grids"] == [[[3, 3], [2, 6]]] * 2
    assert outcomes["640 x 480"]["tiles"] == [13, 13]
    assert all(outcomes[name]["greedy"] == outcomes[name]["tokens"] > 0 for name in CASES)


QUANTISED = {
    "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16, "zero_point": True
}  # fmt: skip
INTERNLM2 = dataclasses.replace(
    Shape(), backbone="InternLM2ForCausalLM", text_bias=False, heads=8, kv_heads=2, head_dim=8
)
PACKED = dataclasses.replace(SIX_B_LIKE, tied=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "config"),
    [(INTERNLM2, "bfloat16", {}), (PACKED, "float32", {"quantization_config": QUANTISED})],
    ids=["InternLM2 in bfloat16", "6B-like, tied, in four bits"],
)
def test_original_checkpoints_too(
    shape: Shape, dtype: str, config: dict[str, Any], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        if config:
            in_four_bits(tensors, 16)

    folder = make_checkpoint(
        tmp_path, format="chat", shape=shape, shards=2, change=change, config=config
    )
    done = verify(folder, "--tokens", "4", "--dtype", dtype, "--cases", "frames", "two pictures")
    assert (done.returncode, wrong(done)) == (0, []), done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:3]] == list(CASES[:2:-1])
    assert f"Computed in {dtype}." in done.stdout


def test_whatever_differs_is_named(tmp_path: Path) -> None:
    """Another weight, another number of tiles: of the folder that transformers reads."""

    def change(tensors: Tensors) -> None:
        tensors["model.language_model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5

    ours = make_checkpoint(tmp_path / "ours")
    other = make_checkpoint(tmp_path / "other", change=change)
    settings = json.loads((other / "preprocessor_config.json").read_text("utf-8"))
    settings["max_patches"] = 6
    (other / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")
    done = verify(ours, "--against", str(other), "--tokens", "4", "--dtype", "float32")
    assert done.returncode == 1, done.stderr
    found = wrong(done)
    assert "Something differs." in done.stdout
    assert any(line.startswith("text: logits: differ by") for line in found)
    assert "640 x 480: tiles: 13 instead of 7" in found
    assert "640 x 480: grids: 4x3 instead of 3x2" in found
    assert any(line.startswith("640 x 480: prompt: differs from token") for line in found)
    assert not any(line.startswith("448 x 448: pixels") for line in found)


def test_what_cannot_be_served_is_told(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, config={"architectures": ["Other"]})
    done = verify(folder)
    assert done.returncode == 2
    assert "config.json: architecture 'Other' is not supported" in done.stderr
    done = verify(folder, "--cases", "text", "film")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--cases: 'film' is none of text, picture" in done.stderr
    assert "Traceback" not in done.stderr
    done = verify(CHECKPOINT, "--max-model-len", "40")
    assert done.returncode == 2
    assert "this cannot be served" in done.stderr
    assert "Traceback" not in done.stderr
