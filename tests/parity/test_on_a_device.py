"""The engine on a device that computes beside the host (``tests.standin``): its tokens are those of
the CPU, and once it has started nothing but ``finish`` waits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.runner import ModelRunner
from model.attention import choose
from model.attention.flash import FlashAttention
from tests.checkpoints import Shape, make_checkpoint
from tests.parity import test_parallel as parallel
from tests.parity.driver import Driver
from tests.parity.ranks import beside_the_host
from tests.parity.test_flash import Library, install
from tests.parity.test_graphs import OTHERS, PLAIN, scoring
from tests.parity.test_scheduled import CRAMPED, SHAPE, renamed, requests, run
from tests.process.worst_traffic import request
from tests.standin import Device, standin
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

THERE: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
# Weights are loaded, the largest step is measured, graphs are captured, and then:
WAITS = {
    "copy to the device in weights.py fill",
    "device in memory.py measure",
    "capture in graphs.py __call__",
    "event in runner.py finish",
}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are tests/kernels's."""
    monkeypatch.setattr("model.triton._fault", lambda: "not to be used")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    return run(folder, [requests(), renamed("again")])[0]


def check(device: Device) -> None:
    assert set(device.waits) == WAITS
    assert device.replays > 0


@pytest.mark.parametrize("mode", ["off", "on"])
def test_steps_do_not_wait(folder: Path, expected: dict[str, list[int]], mode: str) -> None:
    """The second time prefixes and pictures are found, and what a block has in part is copied."""
    with standin() as device:
        found, core = run(folder, [requests(), renamed("again")], async_scheduling=mode, **THERE)
    assert found == expected
    assert core._scheduler.stats.preemptions == 0
    check(device)


@pytest.mark.parametrize("case", ["few blocks", "few of everything"])
def test_nor_do_they_when_there_is_little_of_everything(
    folder: Path, expected: dict[str, list[int]], case: str
) -> None:
    with standin() as device:
        found, core = run(folder, [requests()], async_scheduling="on", **THERE, **CRAMPED[case])
    assert found == {name: expected[name] for name in found}
    assert core._scheduler.stats.preemptions > 0
    check(device)


def test_nor_does_any_way_to_draw(folder: Path) -> None:
    def generate(**settings: Any) -> list[list[int]]:
        driver = Driver(folder, max_num_seqs=16, **settings)
        for index, (name, params) in enumerate(every.items()):
            driver.add(name, [index, *range(5 + index)], sampling=params)
        return driver.generate(12)

    every: dict[str, SamplingParams] = {
        name: scoring(params) for name, params in (PLAIN | OTHERS).items()
    }
    assert {params.prompt_logprobs for params in every.values()} == {0, -1}
    there = generate()
    with standin() as device:
        assert generate(**THERE) == there
    assert set(device.waits) == WAITS


def test_nor_does_what_a_librarys_attention_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashAttention, "devices", ("cpu", "cuda"))
    library = install(monkeypatch, "flash_attn", Library())
    # Which refuses numbers of 32 bits, in which rows do not depend on those beside them.
    monkeypatch.setattr(
        "engine.runner.choose",
        lambda name, config, where, dtype, size: choose(name, config, where, torch.half, size),
    )
    # Few tokens at a time, so that older keys are gathered.
    settings: dict[str, Any] = {"attention_backend": "flash_attn", "max_num_batched_tokens": 32}
    expected, _ = run(folder, [requests()], **settings)
    library.calls.clear()
    with standin() as device:
        found, _ = run(folder, [requests()], **THERE, **settings)
    assert found == expected
    assert sum(queries < keys for queries, keys in library.calls) > 10
    choice = ("test_flash.py", "test_attention.py", "flash.py _error", "flash.py <genexpr>")
    waits = {wait for wait in device.waits if not any(part in wait for part in choice)}
    assert waits == WAITS


def test_the_worst_traffic_stays_within_the_memory_it_may_take(tmp_path: Path) -> None:
    """And does not leave much: the cache has what the largest step and pictures leave of it."""
    shape = Shape(tile_size=112, image_size=112, vocab=20_000)
    settings = EngineSettings(
        model=str(make_checkpoint(tmp_path, shape=shape)),
        max_num_seqs=24,
        max_num_batched_tokens=1024,
        max_num_encoder_tiles=52,
        encoder_cache_bytes=1 << 20,
        block_size=16,
        step_budget_ms=0,
        cuda_graphs=False,  # those of the stand-in do not share memory
        **THERE,
    )
    with standin() as device:
        device.total = 48 << 20
        runner = ModelRunner(settings)
        ready = runner.ready()
        assert ready.max_model_len == 1024
        core = EngineCore(settings, runner, ready)
        running = 0
        torch.cuda.reset_peak_memory_stats()
        # The first leaves the beginning of all in the cache, or they could not run at once.
        for numbers in (range(1), range(1, 1 + settings.max_num_seqs)):
            for number in numbers:
                core.add(*request(ready, number))
            while (report := core.step()) is not None:
                running = max(running, report.stats.running)
                assert not any(output.error for output in report.outputs)
    assert running == settings.max_num_seqs
    allowed = settings.gpu_memory_utilization * device.total
    assert 0.8 * allowed < device.peak <= allowed


@pytest.mark.parametrize("stages", [1, 2])
def test_nor_do_ranks(tmp_path: Path, stages: int) -> None:
    """Two of one stage, which sum and gather on the device, or one behind the other."""
    folder = make_checkpoint(tmp_path, shape=parallel.SHAPES["tied"])
    plain = parallel.settings(folder)
    alone = parallel.answers(ModelRunner(plain), plain)
    options = dataclasses.replace(
        plain, pipeline_parallel_size=stages, async_scheduling="on", **THERE
    )
    with beside_the_host(options) as (device, ranks):
        parallel.answers(ranks, options).equal(alone, parallel.EXACT)
        assert set(device.waits) == {"event in runner.py finish"}
        assert device.replays > 0
