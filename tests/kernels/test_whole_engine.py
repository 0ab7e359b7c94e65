"""An engine that runs on the kernels alone gives the tokens of the reference."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.runner import ModelRunner
from model import triton as kernels
from tests import fp8
from tests.checkpoints import Shape, make_checkpoint
from tests.parity import test_parallel as parallel
from tests.parity.direct import prompt
from tests.parity.driver import GREEDY, Driver
from tests.parity.ranks import beside_the_host
from tests.parity.test_scheduled import requests
from tests.replay import Replays
from tests.standin import standin
from wire.messages import EngineRequest
from wire.sampling import SamplingParams

# Groups of 7 as in the 1B and 7B models, and pages that rows outgrow.
SHAPE = Shape(heads=14, kv_heads=2, vision_layers=1)
MIXTURE = dataclasses.replace(
    SHAPE, backbone="Qwen3MoeForCausalLM", text_bias=False, experts=6, dense_layers=(1,)
)
SAMPLING = [
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9, min_p=0.01, seed=3),
    SamplingParams(top_k=30, seed=4, logit_bias=((5, 2.0),), frequency_penalty=0.5),
]
# Small, as a start computes the largest step there is.
SETTINGS: dict[str, Any] = {
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "dtype": "float32",
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "max_num_encoder_tiles": 1,
    "encoder_chunk_tiles": 1,
    "max_model_len": 60,
}


def generate(folder: Path) -> dict[str, list[int]]:
    """Three rows, one of which starts later and in chunks."""
    driver = Driver(folder, **SETTINGS)
    for index, (tiles, sampling) in enumerate(zip([[], [1], [1]], SAMPLING, strict=True)):
        ids, pixels = prompt(SHAPE, tiles, index)
        driver.add(str(index), ids, [] if pixels is None else [pixels], sampling)
    driver.step({"0": 9, "1": 20})
    for _ in range(10):
        driver.step({"0": 1, "1": 1, "2": 7})
    assert not any(sequence.error for sequence in driver.sequences.values())
    return {name: sequence.output for name, sequence in driver.sequences.items()}


def test_tokens_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of single tokens and passes of the encoder are replayed, others are not."""
    folder = make_checkpoint(tmp_path, shape=SHAPE)
    monkeypatch.setattr("model.triton.missing", lambda device: "not to be used")
    expected = generate(folder)
    assert min(len(output) for output in expected.values()) > 5
    monkeypatch.setattr("model.triton.missing", lambda device: None)
    monkeypatch.setitem(SETTINGS, "attention_backend", "triton")
    replays = Replays()
    monkeypatch.setattr("engine.runner.capture_on", lambda device: replays)
    assert generate(folder) == expected
    assert replays.count > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other test runs on the device itself")
@pytest.mark.parametrize(
    ("shape", "graphs"),
    [(SHAPE, False), (SHAPE, True), (MIXTURE, True)],
    ids=["eager", "graphs", "mixture of experts"],
)
def test_so_it_does_beside_the_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    shape: Shape,
    graphs: bool,
) -> None:
    """On a device made of main memory, where graphs are captured and nothing but ``finish`` waits
    for a step."""
    folder = make_checkpoint(tmp_path, shape=shape)
    with monkeypatch.context() as patch:
        patch.setattr("model.triton.missing", lambda device: "not to be used")
        expected = generate(folder)
    # Asked anew: elsewhere the answer is another one.
    monkeypatch.setattr("model.triton._fault", kernels._fault.__wrapped__)
    monkeypatch.setitem(SETTINGS, "device", "cuda")
    monkeypatch.setitem(SETTINGS, "cuda_graphs", graphs)
    with standin() as device, caplog.at_level(logging.INFO):
        assert generate(folder) == expected
    assert "attention=triton" in caplog.text
    assert (device.replays > 10) == graphs
    starts = ("weights.py fill", "memory.py measure", "graphs.py __call__", "triton_paged.py")
    waits = {wait for wait in device.waits if not any(part in wait for part in starts)}
    assert waits == {"event in runner.py finish"}


@fp8.needed
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in takes its place")
def test_steps_in_float8_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounds while it makes a norm or an activation is in graphs, and they change nothing."""
    folder = make_checkpoint(tmp_path, shape=SHAPE)
    monkeypatch.setattr("model.triton._fault", kernels._fault.__wrapped__)
    options = {"device": "cuda", "dtype": "bfloat16", "quantization": "fp8"}
    for name, value in options.items():
        monkeypatch.setitem(SETTINGS, name, value)
    found = []
    for graphs in (False, True):
        monkeypatch.setitem(SETTINGS, "cuda_graphs", graphs)
        with standin() as device:
            found.append(generate(folder))
        assert (device.replays > 10) == graphs
    assert found[0] == found[1]
    assert min(len(output) for output in found[0].values()) > 5


def short(request: EngineRequest, buffers: list[bytes]) -> tuple[EngineRequest, list[bytes]]:
    sampling = msgspec.structs.replace(request.sampling, max_tokens=8, min_tokens=0)
    return msgspec.structs.replace(request, sampling=sampling), buffers


@pytest.mark.skipif(torch.cuda.is_available(), reason="that takes several devices")
def test_what_ranks_sum_is_captured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture on two ranks, each with its part of every expert."""
    monkeypatch.setattr("model.triton._fault", kernels._fault.__wrapped__)
    monkeypatch.setattr(parallel, "requests", lambda: [short(*each) for each in requests()[:2]])
    folder = make_checkpoint(tmp_path, shape=parallel.SHAPES["mixture"])
    plain = dataclasses.replace(
        parallel.settings(folder),
        max_num_seqs=2,
        max_num_batched_tokens=32,
        max_num_encoder_tiles=1,
        encoder_chunk_tiles=1,
        max_model_len=100,
    )
    alone = parallel.answers(ModelRunner(plain), plain)
    options = dataclasses.replace(plain, device="cuda", dtype="float32", async_scheduling="on")
    with beside_the_host(options) as (device, ranks):
        parallel.answers(ranks, options).equal(alone, parallel.EXACT)
        assert set(device.waits) == {"event in runner.py finish"}
        assert device.replays > 10
