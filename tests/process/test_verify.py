"""``internvl verify``: the real command, on models that are what transformers computes and on one
that is not."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo import CHECKPOINT
from engine.official import Official
from engine.verify import Watched
from model.config import TEMPLATES
from server.verify import prepared
from tests.checkpoints import SIX_B_LIKE, Shape, Tensors, in_four_bits, make_checkpoint
from tests.servers import ROOT
from wire.loading import load

CASES = ("text", "picture", "wide picture", "two pictures", "frames")


def command(folder: Path, *flags: str) -> list[str]:
    # Small, and nothing to measure first.
    settings = ("--max-num-seqs", "1", "--num-kv-blocks", "16", "--step-budget-ms", "0")
    return [sys.executable, "-m", "server", "verify", str(folder), *settings, *flags]


def verify(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *flags),
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
    flags = ("--quantization", "awq") if config else ()
    done = verify(
        folder, "--tokens", "4", "--dtype", dtype, "--cases", "frames", "two pictures", *flags
    )
    assert (done.returncode, wrong(done)) == (0, []), done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:3]] == list(CASES[:2:-1])
    assert f"Computed in {dtype}{', awq' if config else ''}." in done.stdout


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


def test_tiles_of_another_size_are_named(tmp_path: Path) -> None:
    ours = make_checkpoint(tmp_path / "ours")
    other = make_checkpoint(tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text("utf-8"))
    settings["size"] = {"height": 84, "width": 84}
    (other / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")
    flags = ("--tokens", "1", "--dtype", "float32", "--cases", "text")
    done = verify(ours, "--against", str(other), *flags)
    assert done.returncode == 1, done.stderr
    assert "1 x 1: pixels: tiles are 56 wide instead of 84" in wrong(done)
    assert any(line.startswith("1 x 1: prompt: differs from token") for line in wrong(done))


@pytest.mark.parametrize("sentence", [None, "你是书生。"])
def test_a_wrong_word_of_our_own_is_seen(
    sentence: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' side does not take the conversation from the model's tables."""
    folder = make_checkpoint(tmp_path, format="chat")
    if sentence is not None:
        monkeypatch.setitem(TEMPLATES, "internvl2_5", (sentence, "\n"))
    few = {"media_workers": "1", "num_kv_blocks": "16", "step_budget_ms": "0"}
    settings = load(few | {"model": str(folder)}, {})
    ready = Watched(settings.engine).ready()
    case = asyncio.run(prepared(settings, ready, ["text"], 1))[0]
    assert (case.request.prompt == Official(folder, 0).prompt(case, [])) == (sentence is None)


def test_nothing_is_left_of_one_that_is_ended(tmp_path: Path) -> None:
    flags = ("--tokens", "300", "--cases", "text")
    began = subprocess.Popen(
        command(CHECKPOINT, *flags),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    with began:
        assert began.stderr is not None
        while b"ours: text" not in began.stderr.readline():
            pass
        (child,) = Path(f"/proc/{began.pid}/task/{began.pid}/children").read_text().split()
        assert list(tmp_path.iterdir())
        began.terminate()
        assert began.wait(60) == 128 + 15
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_served_is_told(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, config={"architectures": ["Other"]})
    done = verify(folder)
    assert done.returncode == 2
    assert "config.json: architecture 'Other' is not supported" in done.stderr
    done = verify(folder, "--cases", "text", "film")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--cases: 'film' is none of text, picture" in done.stderr
    assert "Traceback" not in done.stderr
    for flags in (("--tokens", "0"), ("--out", str(tmp_path / "there" / "out.json"))):
        done = verify(folder, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{flags[0]}: " in done.stderr
        assert "Traceback" not in done.stderr
    done = verify(CHECKPOINT, "--max-model-len", "40")
    assert done.returncode == 2
    assert "this cannot be served" in done.stderr
    assert "Traceback" not in done.stderr
