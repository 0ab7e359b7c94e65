"""The ladder of the benchmarks: that each rung has what it says, and nothing of those above."""

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.ladder import LEVELS, RUNGS, Ladder, measure, rungs
from benchmarks.loop import front_end
from model.native import BEST, LIBRARY, NARROW
from model.ops import NativeOps
from tests.checkpoints import Shape, make_checkpoint

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there was no C compiler")
SHAPE = Shape(vision_size=64, vision_heads=2, size=64, heads=4, kv_heads=2, head_dim=32, vocab=1024)
CALLED = ("linear", "attend", "tile_attention", "decode", "single")


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ladder]:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("ladder")
    yield Ladder(make_checkpoint(folder, shape=SHAPE, dtype=torch.bfloat16))
    torch.set_num_threads(threads)
    LIBRARY.internvl_choose(BEST)


def climbed(ladder: Ladder, rung: str) -> tuple[dict[str, float], Counter[str]]:
    """The figures of a rung, and how often what was called."""
    calls: Counter[str] = Counter()

    def spied(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            if name == "decode":
                calls["of some rows"] += given[2] is not None
            return function(*given)

        return mock.patch.object(LIBRARY, f"internvl_{name}", call)

    with front_end() as channel:
        runner = ladder.runner(rung)
        encode = mock.Mock(wraps=runner._model.encode_tiles)
        with mock.patch.object(runner._model, "encode_tiles", encode):
            patches = [spied(name, getattr(LIBRARY, f"internvl_{name}")) for name in CALLED]
            for patch in patches:
                patch.start()
            try:
                figures = measure(ladder, rung, rung, channel)
            finally:
                for patch in patches:
                    patch.stop()
    calls["tiles"] = encode.call_count
    return figures, calls


def test_each_rung_has_one_thing_more(ladder: Ladder) -> None:
    found = {rung: climbed(ladder, rung) for rung in rungs()}
    assert all(value > 0 for figures, _ in found.values() for value in figures.values())

    def rungs_with(name: str) -> list[str]:
        return [rung for rung, (_, calls) in found.items() if calls[name]]

    names = list(rungs())
    assert names[0] == "torch"
    assert rungs_with("linear") == names[1:]
    assert rungs_with("attend") == ["attention", "tiles"]
    assert rungs_with("tile_attention") == names[names.index("tiles") :]
    assert rungs_with("decode") == names[names.index("layers") :]
    assert rungs_with("single") == names[names.index("single") :]
    assert rungs_with("of some rows") == names[names.index("wanted") :]
    tiles = [calls["tiles"] for _, calls in found.values()]
    assert tiles == [3] * names.index("pictures") + [2, 6, 6]  # of the pause four
    assert [rung for rung, (figures, _) in found.items() if "pause_ms" in figures] == names[-2:]


def test_a_rung_has_its_instructions_weights_and_settings(ladder: Ladder) -> None:
    names = list(rungs())
    for rung in names:
        with (
            mock.patch.object(LIBRARY, "internvl_choose", wraps=LIBRARY.internvl_choose) as choose,
            ladder.standing(rung) as (core, runner),
        ):
            place = names.index(rung)
            levels = [LEVELS[name] for name in names[: place + 1] if name in LEVELS]
            assert choose.call_args.args == (max(levels, default=BEST),)
            narrow = place >= names.index("narrow") if NARROW else False
            ops = runner._model.ops
            assert getattr(ops, "_narrows", False) == narrow
            head = ops.matrix(runner._model.decoder.output) if isinstance(ops, NativeOps) else None
            sketched = NARROW and place >= names.index("sketch")
            assert bool(head is not None and head.sketch) == sketched
            assert core._scheduler._prefixes.enabled == (place >= names.index("prefixes"))
            assert (core._scheduler._step_seconds < 1) == (rung == "budget")


def test_a_processor_stands_on_the_rungs_it_has() -> None:
    with mock.patch.object(LIBRARY, "internvl_choose", return_value=2):
        assert not {"avx512", "amx"} & rungs().keys()
        assert "avx2" in rungs()
    assert [*rungs()] == [name for name in RUNGS if name in rungs()]
