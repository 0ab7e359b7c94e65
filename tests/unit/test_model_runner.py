"""What the runner says of the model and of the memory it took, and which settings it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.memory import free_memory, shallow
from engine.runner import ModelRunner
from model import load_config
from model.kv_cache import KVCache
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.direct import load
from wire.messages import Progress
from wire.settings import EngineSettings

SHAPE = Shape()
BLOCK = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


def settings(folder: Path, **values: Any) -> EngineSettings:
    values = {"device": "cpu", "threads": 1, "block_size": BLOCK} | values
    return EngineSettings(model=str(folder), **values)


def test_loading_tells_how_far_it_is_and_what_was_loaded(folder: Path) -> None:
    seen: list[Progress] = []
    ready = ModelRunner(settings(folder, block_size=8, num_kv_blocks=20), seen.append).ready()
    stages = [progress.stage for progress in seen]
    assert list(dict.fromkeys(stages)) == ["config", "weights", "cache", "warm-up"]
    assert len(stages) < 110
    assert (ready.dtype, ready.device, ready.attention) == ("float32", "cpu", "sdpa")
    assert (ready.block_size, ready.blocks_total) == (8, 20)
    assert ready.max_model_len == 160  # all that the cache can hold
    assert ready.vision_token_bytes == 4 * SHAPE.size


def test_a_model_that_cannot_compute_is_never_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("InternVL.encode_tiles", "InternVL.logits"):
        with monkeypatch.context() as patch:
            patch.setattr(f"model.{part}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ModelRunner(settings(folder, num_kv_blocks=20))


@pytest.mark.parametrize("blocks", [20, 2, 1])
def test_the_warm_up_leaves_nothing_behind(folder: Path, blocks: int) -> None:
    # A context too short for a picture is warmed up without one.
    runner = ModelRunner(settings(folder, num_kv_blocks=blocks, block_size=2))
    assert not runner._rows._rows
    assert not runner._vision._outputs
    assert not runner._vision._tiles


def test_a_context_beyond_the_positions_is_told_apart_from_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "engine.choices"):
        ready = ModelRunner(settings(folder, max_model_len=1025)).ready()
    assert "beyond 1024 tokens, the model's positions" in caplog.text
    assert (ready.max_model_len, ready.max_positions) == (1025, 1024)
    assert (ready.context(), ready.context(saved=1), ready.context(saved=9)) == (1024, 1025, 1025)


def test_settings_that_do_not_fit_the_checkpoint_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no memory for the KV cache"):
        ModelRunner(settings(folder, kv_cache_memory=10))


def test_memory_for_the_cache_is_divided_into_blocks(folder: Path) -> None:
    block = 2 * 2 * SHAPE.kv_heads * SHAPE.head_dim * BLOCK * 4  # layers, key and value, ..., fp32
    ready = ModelRunner(settings(folder, kv_cache_memory=10 * block + 5)).ready()
    assert ready.blocks_total == 10
    # Never more than full rows could use.
    ready = ModelRunner(settings(folder, max_num_seqs=2, max_model_len=100)).ready()
    assert (ready.blocks_total, ready.max_model_len) == (14, 100)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max", 8_192_000),
        ("3000000", 2_300_000),  # what files take can be had
        ("99999999", 8_192_000),
        ("500000", 0),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_bounds_what_is_free(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    expected: int,
    version: int,
) -> None:
    assert free_memory() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:  8000 kB\n")
    names = ("memory.max", "memory.current")
    if version == 1:
        (tmp_path / "memory").mkdir()
        names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    (tmp_path / names[0]).write_text(limit + "\n")
    (tmp_path / names[1]).write_text("1000000\n")
    stat = tmp_path / names[0]
    stat.with_name("memory.stat").write_text("anon 5\nactive_file 100000\ninactive_file 200000\n")
    monkeypatch.setattr("engine.memory._PROC", tmp_path)
    monkeypatch.setattr("engine.memory._CGROUP", tmp_path)
    assert free_memory() == expected


def test_a_cache_that_cannot_fit_is_refused_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"encoder_cache_bytes": 1000, "request_tile_bytes": 1 << 20}
    monkeypatch.setattr("engine.memory.free_memory", lambda: 200 << 20)
    block = KVCache.block_bytes(load_config(folder).text, BLOCK, torch.float32)
    many = (200 << 20) // block
    for explicit in ({"num_kv_blocks": many}, {"kv_cache_memory": 200 << 20}):
        with pytest.raises(ValueError, match="more than the 209715200 bytes that are free"):
            ModelRunner(settings(folder, max_num_seqs=many, **explicit, **values))
    assert ModelRunner(settings(folder, num_kv_blocks=9, **values)).ready().blocks_total == 9
    with pytest.raises(ValueError, match="0 are there"):
        ModelRunner(settings(folder, cpu_memory_utilization=0.1, **values))


def test_the_cache_gets_what_a_share_leaves_beside_the_largest_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.memory.free_memory", lambda: 300 << 20)
    monkeypatch.setattr("engine.runner.measure", lambda device, run: 32 << 20)
    values: dict[str, Any] = {"encoder_cache_bytes": 20 << 20, "request_tile_bytes": 40 << 20}
    ready = ModelRunner(settings(folder, cpu_memory_utilization=0.5, **values)).ready()
    block = KVCache.block_bytes(load_config(folder).text, BLOCK, torch.float32)
    # 32 MiB are added for what the C library holds, and a table for the angles of all positions.
    angles = SHAPE.positions * SHAPE.head_dim * 4
    assert angles > 2 * block
    assert ready.blocks_total == (((150 - 32 - 32 - 20 - 40) << 20) - angles) // block


def test_a_shallow_model_has_layers_of_every_kind(tmp_path: Path) -> None:
    shape = dataclasses.replace(
        Shape(), backbone="Qwen3MoeForCausalLM", text_bias=False, layers=5, experts=2,
        dense_layers=(0, 1, 4),
    )  # fmt: skip
    model = load(make_checkpoint(tmp_path, shape=shape))
    whole = list(model.decoder.layers)
    with shallow(model):
        assert list(model.decoder.layers) == whole[:3]
        assert len(model.vision.layers) == 2
    assert list(model.decoder.layers) == whole
