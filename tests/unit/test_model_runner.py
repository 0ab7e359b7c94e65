"""What the runner says of the model and of the memory it took, and which settings it refuses."""

from pathlib import Path
from typing import Any

import pytest

from engine.memory import free_memory
from engine.runner import ModelRunner
from tests.checkpoints import Shape, make_checkpoint
from wire.messages import Progress
from wire.settings import EngineSettings

SHAPE = Shape()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


def settings(folder: Path, **values: Any) -> EngineSettings:
    return EngineSettings(model=str(folder), device="cpu", threads=1, **values)


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


def test_settings_that_do_not_fit_the_checkpoint_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="positions end at 1024"):
        ModelRunner(settings(folder, max_model_len=1025))
    with pytest.raises(ValueError, match="no memory for the KV cache"):
        ModelRunner(settings(folder, kv_cache_memory=10))


def test_memory_for_the_cache_is_divided_into_blocks(folder: Path) -> None:
    block = 2 * 2 * SHAPE.kv_heads * SHAPE.head_dim * 16 * 4  # layers, key and value, ..., fp32
    ready = ModelRunner(settings(folder, kv_cache_memory=10 * block + 5)).ready()
    assert ready.blocks_total == 10
    # Never more than full rows could use.
    ready = ModelRunner(settings(folder, max_num_seqs=2, max_model_len=100)).ready()
    assert (ready.blocks_total, ready.max_model_len) == (14, 100)


@pytest.mark.parametrize(("limit", "free"), [("max", 8000 * 1024), ("3000000", 2000000)])
def test_a_containers_limit_bounds_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, free: int
) -> None:
    assert free_memory() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable:  8000 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr("engine.memory._MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("engine.memory._CGROUP", tmp_path)
    assert free_memory() == free
