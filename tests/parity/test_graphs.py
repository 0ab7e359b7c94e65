"""Steps that are replayed give the tokens of steps that are not, and only those steps are replayed
that may be. CUDA itself is stood in for (tests.replay)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.graphs import TileGraphs, row_sizes, tile_sizes
from engine.sampling import is_plain
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.direct import load
from tests.parity.driver import GREEDY, Driver
from tests.parity.test_scheduled import CRAMPED, requests, run
from tests.replay import MaskedAttention, Replays
from wire.sampling import SamplingParams

SHAPE = Shape()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def eager(folder: Path) -> dict[str, list[int]]:
    tokens, _ = run(folder, [requests()])
    return tokens


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replays]:
    found = Replays()
    monkeypatch.setattr("engine.runner.capture_on", lambda device: found)
    monkeypatch.setattr("engine.runner.choose", lambda name, config, *_: MaskedAttention(config))
    return found


@pytest.mark.parametrize(
    "settings",
    [{"async_scheduling": "off"}, {}, *CRAMPED.values()],
    ids=["one step at a time", "roomy", *CRAMPED],
)
def test_replayed_is_eager(
    folder: Path, eager: dict[str, list[int]], replays: Replays, settings: dict[str, Any]
) -> None:
    scored = [
        (msgspec.structs.replace(request, sampling=scoring(request.sampling)), buffers)
        for request, buffers in requests()
    ]
    tokens, core = run(folder, [scored], **{"async_scheduling": "on"} | settings)
    assert tokens == eager
    assert replays.count > core._scheduler.stats.steps / 2


def scoring(params: SamplingParams) -> SamplingParams:
    """Some ask for the log-probabilities of their prompts too."""
    return msgspec.structs.replace(params, prompt_logprobs=0 if params.seed % 3 == 0 else -1)


def test_padding_leaves_the_tokens_drawn_last_alone(
    folder: Path, eager: dict[str, list[int]], replays: Replays
) -> None:
    few = [request for request in requests() if len(request[0].items) == 0]
    tokens, _ = run(folder, [few], async_scheduling="on")
    assert len(tokens) == 3  # in a graph of four
    assert tokens == {name: eager[name] for name in tokens}


PLAIN = {
    "greedy": GREEDY,
    "warm": SamplingParams(temperature=0.7, seed=3),
    "hot": SamplingParams(temperature=1.0, seed=4),
    "stopped": SamplingParams(temperature=0.0, stop_token_ids=(7,)),
}
OTHERS = {
    "top_p": SamplingParams(temperature=1.0, top_p=0.9, seed=5),
    "logprobs": SamplingParams(temperature=0.0, logprobs=2),
    "bias": SamplingParams(temperature=0.0, logit_bias=((9, 100.0),)),
    "late": SamplingParams(temperature=0.0, stop_token_ids=(7,), min_tokens=9),
    "penalty": SamplingParams(temperature=0.0, presence_penalty=1.0),
}


def generate(folder: Path, params: dict[str, SamplingParams]) -> list[list[int]]:
    driver = Driver(folder, max_num_seqs=16)
    for index, (name, sampling) in enumerate(params.items()):
        driver.add(name, [index, *range(5 + index)], sampling=sampling)
    return driver.generate(20)


@pytest.mark.parametrize("params", [PLAIN, OTHERS, PLAIN | OTHERS], ids=["plain", "others", "all"])
def test_every_parameter_is_obeyed(
    folder: Path, params: dict[str, SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(folder, params)
    replays = Replays()
    monkeypatch.setattr("engine.runner.capture_on", lambda device: replays)
    monkeypatch.setattr("engine.runner.choose", lambda name, config, *_: MaskedAttention(config))
    assert generate(folder, params) == expected
    # 19 steps of single tokens behind the warm-up: logits, and tokens where all rows are plain.
    steps = replays.count - 3
    assert steps == (38 if params is PLAIN else 19)


def test_rows_that_need_more_than_a_temperature_are_not_plain() -> None:
    assert all(is_plain(params, None) for params in PLAIN.values())
    assert is_plain(SamplingParams(temperature=0.0, top_p=0.5, min_p=0.1), None)
    for name, params in OTHERS.items():
        assert not is_plain(params, None), name


def test_only_steps_of_drawn_tokens_are_replayed(folder: Path, replays: Replays) -> None:
    driver = Driver(folder, max_num_seqs=4)
    before = replays.count
    driver.add("a", [1, 2, 3])
    driver.step({"a": 1})  # one token, but nothing is drawn
    driver.step({"a": 1})
    assert replays.count == before
    driver.step({"a": 1})
    assert replays.count == before + 2  # one of three: they are alike from here
    driver.add("b", [4, 5])
    driver.step({"a": 1, "b": 2})
    assert replays.count == before + 2
    scoring = msgspec.structs.replace(GREEDY, prompt_logprobs=1)
    driver.add("c", [6], sampling=scoring)
    driver.step({"a": 1, "b": 1, "c": 1})
    assert replays.count == before + 4


def test_more_rows_than_any_graph_has_are_computed_without(
    folder: Path, replays: Replays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.graphs._ROWS", (1, 2))
    driver = Driver(folder, max_num_seqs=4)
    for name in "abc":
        driver.add(name, [1, 2, 3])
    driver.step(dict.fromkeys("abc", 9))
    before = replays.count
    driver.step(dict.fromkeys("abc", 1))
    assert replays.count == before
    driver.step(dict.fromkeys("ab", 1))
    assert replays.count == before + 2


def test_graphs_can_be_switched_off(folder: Path, replays: Replays) -> None:
    Driver(folder, cuda_graphs=False).generate(1)
    assert replays.captured == 0


def test_an_engine_goes_on_without_graphs_that_cannot_be_captured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    expected = generate(folder, PLAIN)
    monkeypatch.setattr("engine.runner.capture_on", lambda device: fails)
    assert generate(folder, PLAIN) == expected
    assert "no graphs: operation not permitted when stream is capturing" in caplog.text


def test_sizes_reach_as_far_as_a_step() -> None:
    assert row_sizes(1) == [1]
    assert row_sizes(64) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert row_sizes(50)[-2:] == [48, 50]
    assert row_sizes(4000)[-1] == 512
    assert tile_sizes(16) == [1, 2, 3, 4, 5, 7, 9, 13, 16]
    assert tile_sizes(6)[-2:] == [5, 6]


def test_tiles_are_padded_only_where_that_is_little(folder: Path) -> None:
    model, replays = load(folder), Replays()
    with torch.inference_mode():
        graphs = TileGraphs(model, tile_sizes(16), replays)
        replayed = []
        for count in range(1, 18):
            tiles = torch.randint(0, 256, (count, 3, SHAPE.tile_size, SHAPE.tile_size))
            tiles = tiles.to(torch.uint8)
            before = replays.count
            torch.testing.assert_close(
                graphs(tiles), model.encode_tiles(tiles), atol=1e-5, rtol=1e-5
            )
            if replays.count > before:
                replayed.append(count)
        assert replayed == [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 14, 15, 16]
        first = graphs(tiles[:1])
        kept = first.clone()
        graphs(tiles[1:2])
        assert torch.equal(first, kept)
