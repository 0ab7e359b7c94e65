"""The engine on a device that computes beside the host (``tests.standin``): its tokens are those of
the CPU, and once it has started nothing but ``finish`` waits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention import choose
from model.attention.flash import FlashAttention
from tests.checkpoints import make_checkpoint
from tests.parity.driver import Driver
from tests.parity.test_flash import Library, install
from tests.parity.test_graphs import OTHERS, PLAIN, scoring
from tests.parity.test_scheduled import CRAMPED, SHAPE, renamed, requests, run
from tests.standin import Device, standin
from wire.sampling import SamplingParams

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
