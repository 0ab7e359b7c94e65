"""``internvl plan`` and ``internvl doctor``: what a model takes of a memory, and what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import doctor, sizing
from engine.runner import ModelRunner
from engine.sizing import describe, size
from model import load_config
from server.cli import main
from tests.checkpoints import INTERNVL3, Shape, make_checkpoint
from wire.settings import EngineSettings

GIB = 1 << 30
# Billions of parameters as published, GiB of weights in bfloat16, bytes of keys and values of a
# token: worked out by hand from the published dimensions.
PUBLISHED = {
    "1B": (0.938, 1.75, 12_288),
    "2B": (2.089, 3.89, 28_672),
    "8B": (7.944, 14.80, 57_344),
    "9B": (9.14, 17.03, 49_152),
    "14B": (15.117, 28.16, 196_608),
    "38B": (38.388, 71.50, 262_144),
    "78B": (78.408, 146.05, 327_680),
}


# The 9B has no native conversion.
@pytest.mark.parametrize(
    ("name", "format"),
    [(name, form) for name in PUBLISHED for form in ("chat", "hf") if (name, form) != ("9B", "hf")],
)
def test_every_size_takes_what_is_published(tmp_path: Path, name: str, format: str) -> None:
    shape = INTERNVL3[name]
    folder = make_checkpoint(tmp_path, format=format, shape=shape, weights=False)
    found = size(load_config(folder), EngineSettings(), 80 * GIB)
    billions, weights, token = PUBLISHED[name]
    assert sum(found.parameters.values()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert found.weights / GIB == pytest.approx(weights, abs=0.02)
    assert found.token == token
    assert found.picture_tokens == 3330
    assert found.fits == (name not in ("38B", "78B"))


def test_a_native_checkpoint_has_a_head_whatever_it_says(tmp_path: Path) -> None:
    says = {"tie_word_embeddings": True}
    folder = make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False, config=says)
    found = size(load_config(folder), EngineSettings(), GIB)
    assert found.weights / GIB == pytest.approx(14.80, abs=0.02)


def test_eight_bits_halve_the_layers_alone(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False))
    whole, small = (
        size(config, EngineSettings(quantization=kind), 24 * GIB) for kind in ("none", "fp8")
    )
    # 28 layers of 233 million weights.
    assert (whole.weights - small.weights) / 1e9 == pytest.approx(28 * 0.233, rel=0.01)
    least = size(config, EngineSettings(quantization="bnb-4bit"), 24 * GIB)
    # Each a half byte, and an fp32 scale with 63 others.
    saved = 28 * 0.233 * (2 - 0.5 - 4 / 64)
    assert (whole.weights - least.weights) / 1e9 == pytest.approx(saved, rel=0.01)
    assert whole.parameters == small.parameters


def test_devices_share_the_decoder_and_have_the_encoder_each(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, shape=INTERNVL3["38B"], weights=False))
    whole = size(config, EngineSettings(), 80 * GIB)
    four = size(config, EngineSettings(tensor_parallel_size=4), 80 * GIB)
    assert four.parameters == whole.parameters
    encoder = 2 * (whole.parameters["encoder"] + whole.parameters["projector"])
    # The norms are there four times: 64 layers with two, and one more, of 5120.
    norms = 2 * 129 * 5120
    assert four.weights - encoder == pytest.approx(
        (whole.weights - encoder - norms) / 4 + norms, rel=1e-4
    )
    assert four.token == whole.token // 4
    assert (whole.fits, four.fits) == (False, True)
    told = describe(four, 80 * GIB)
    assert "on each of 4      10 of 40 query heads, 2 of 8 key heads, the whole encoder" in told[2]


def test_a_step_holds_what_all_chosen_experts_make_of_a_token(tmp_path: Path) -> None:
    """Of InternVL3.5-30B-A3B's width, in so large a step that its layers take the most of it."""
    shape = Shape(
        backbone="Qwen3MoeForCausalLM", text_bias=False, size=2048, layers=1, heads=32, kv_heads=4,
        head_dim=128, mlp=6144, experts=128, experts_per_token=8, expert_mlp=768,
    )  # fmt: skip
    config = load_config(make_checkpoint(tmp_path, shape=shape, weights=False))
    tokens, hidden = 1 << 18, 3 * 2048
    for ranks in (1, 4):
        settings = EngineSettings(tensor_parallel_size=ranks, max_num_batched_tokens=tokens)
        step = size(config, settings, 80 * GIB).step
        # Their results are as wide on every rank.
        assert step == tokens * (hidden + 8 * (768 // ranks + 2048)) * 2


def test_a_key_head_is_never_divided(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, shape=INTERNVL3["2B"], weights=False))
    sizes = [size(config, EngineSettings(tensor_parallel_size=n), GIB).token for n in (1, 2, 4)]
    assert sizes == [28_672, 14_336, 14_336]


def test_what_would_fit_is_said(tmp_path: Path) -> None:
    config = load_config(make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False))
    short = size(config, EngineSettings(), 18 * GIB)
    assert 0 < short.tokens < 32768
    last = describe(short, 18 * GIB)[-1]
    assert last.endswith(f"with --max-model-len {short.tokens} it does.")
    held = EngineSettings(max_model_len=short.tokens)
    assert size(config, held, 18 * GIB).fits
    half = EngineSettings(gpu_memory_utilization=0.5)
    told = describe(size(config, half, 8 * GIB), 8 * GIB)[-1]
    found = re.fullmatch(r"It does not fit: at least (.*) GiB are missing.", told)
    assert found
    enough = 8 + float(found[1])
    assert not size(config, half, int((enough - 0.1) * GIB)).tokens
    assert size(config, half, int((enough + 0.1) * GIB)).tokens


def test_the_commands(tmp_path: Path) -> None:
    large, small = (
        make_checkpoint(tmp_path / size, shape=INTERNVL3[size], weights=False)
        for size in ("8B", "1B")
    )

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "server", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout + done.stderr

    status, told = run("plan", str(large), "--gpu-memory", "24GiB", "--max-model-len", "999999")
    assert status == 1
    assert "with a context of 999999 tokens" in told
    status, told = run("doctor", str(small))  # which fits into what is free here
    assert status == 0, told
    assert "checkpoint of the format 'hf', with Qwen2ForCausalLM" in told
    assert "are decoded" in told


@pytest.mark.parametrize("command", [["plan", "", "--gpu-memory", "1GiB"], ["settings"]])
def test_whoever_reads_may_have_read_enough(command: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "server", *command],
        stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    os.close(theirs)
    assert done.returncode != 0
    assert done.stderr == ""


def test_how_many_devices_are_enough_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False)

    def plan(gib: int, devices: int) -> tuple[int, str]:
        settings = EngineSettings(model=str(folder), tensor_parallel_size=devices)
        told = msgspec.json.encode(settings).decode()
        monkeypatch.setattr("sys.argv", ["", str(gib * GIB), told])
        status = sizing.main()
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).splitlines()[-1]

    assert plan(12, 1) == (1, "On 2 such devices it does (--tensor-parallel-size 2).")
    assert plan(12, 2) == (0, "It fits.")
    assert plan(2, 1)[1].endswith("are missing.")
    status, told = plan(12, 3)
    assert status == 2
    assert told.startswith("tensor_parallel_size 3 does not divide the model: it has 28 query")


def test_the_fullest_stage_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False)

    def plan(**settings: Any) -> tuple[int, str]:
        told = msgspec.json.encode(EngineSettings(model=str(folder), **settings)).decode()
        monkeypatch.setattr("sys.argv", ["", str(12 * GIB), told])
        status = sizing.main()
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    # 233 046 016 weights in a matrix of each layer, and 11 776 in norms and biases.
    status, told = plan(pipeline_parallel_size=2)
    assert status == 0
    assert "17 of 28 layers; bytes" in told
    assert f"{17 * (233_046_016 + 11_776) * 2 / GIB:.2f} GiB in bfloat16" in told
    assert f"tokens of {17 * 2 * 4 * 128 * 2} bytes" in told
    # Where most of a device is left for the cache, the encoder's stage has the least.
    status, told = plan(pipeline_parallel_size=28)
    assert "1 of 28 layers, encoder, embedding and head; bytes" in told
    _, one = plan(tensor_parallel_size=2)
    status, two = plan(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert status == 0
    assert "14 of 28 query heads" in two
    assert len(two.splitlines()) == len(one.splitlines()) + 1
    expected = "pipeline_parallel_size 29 is more than the model's 28 layers, of which each stage"
    assert plan(pipeline_parallel_size=29) == (2, f"{expected} has at least one\n")


def test_what_cannot_be_served_is_said_and_has_its_own_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = msgspec.json.encode(EngineSettings(model=str(tmp_path))).decode()
    monkeypatch.setattr("sys.argv", ["", "24", settings])
    assert sizing.main() == 2
    assert "is not supported" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["", str(tmp_path)])
    assert doctor.main() == 1
    assert "bad   this checkpoint cannot be served" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["24", "24GiB", "24 g", "0.5TB"])
def test_amounts_of_memory(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        asked.append(command[3])
        told = msgspec.json.decode(command[4], type=EngineSettings)
        assert told.tensor_parallel_size == 2
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("server.commands.machine.subprocess.run", run)
    folder = make_checkpoint(tmp_path, weights=False)
    assert main(["plan", str(folder), "--gpu-memory", text, "--tp", "2"]) == 0
    amounts = {"24": 24, "24GiB": 24 << 30, "24 g": 24 * 10**9, "0.5TB": 500 * 10**9}
    assert asked == [str(amounts[text])]


@pytest.mark.parametrize("text", ["", "0", "0.0GiB", "-3GiB", "24XB", "many", "1e9"])
def test_what_is_no_amount_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", ".", f"--gpu-memory={text}"])
    assert "is no amount of memory, such as 24GiB" in capsys.readouterr().err


def test_what_is_said_of_a_checkpoint_is_what_it_is_served_with(tmp_path: Path) -> None:
    # So small that a CPU computes it in float32, which not all attention can do.
    folder = make_checkpoint(tmp_path, shape=Shape(head_dim=32))
    found = [text for _, text in doctor.examine(str(folder))]
    runner = ModelRunner(EngineSettings(model=str(folder)))
    assert f"computed in {runner.ready().dtype}" in found
    assert f"attention: {runner.ready().attention}: is used" in found


@pytest.mark.parametrize(
    ("free", "state"), [(1 << 40, doctor.OK), (20 << 30, doctor.POOR), (8 << 30, doctor.BAD)]
)
def test_doctor_tells_what_a_model_takes_of_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    monkeypatch.setattr("engine.doctor.free_memory", lambda: free)
    folder = make_checkpoint(tmp_path, shape=INTERNVL3["8B"], weights=False)
    config = load_config(folder)
    share = EngineSettings.cpu_memory_utilization
    plan = size(config, EngineSettings(dtype="bfloat16", gpu_memory_utilization=share), free)
    told = [found for found in doctor.examine(str(folder)) if found[1].startswith("memory: ")]
    assert [found[0] for found in told] == [state]
    assert f"weights {plan.weights / (1 << 30):.2f} GiB" in told[0][1]
    assert f"room for {plan.tokens} tokens" in told[0][1]


def test_what_is_missing_is_told_apart_from_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.doctor.LIBRARY", None)
    monkeypatch.setattr("model.ops.native.LIBRARY", None)
    found = list(doctor.examine())
    assert [text for state, text in found if state == doctor.POOR] == [
        "the project's own C was not compiled: install again with a C compiler, such as gcc"
    ]
    assert (doctor.OK, "attention: sdpa: is used") in found
    monkeypatch.setattr("engine.doctor.BACKENDS", {})
    assert list(doctor.examine())[-1] == (doctor.BAD, "no attention can be used")
