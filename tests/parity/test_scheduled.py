"""The scheduler over the real model: how requests are batched, chunked, preempted or shared out
over the vision cache, and whether steps overlap, changes no token of any of them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.cost import CostModel, Pace
from engine.runner import ModelRunner
from tests.checkpoints import IMAGE_TOKEN, Shape, make_checkpoint
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

SHAPE = Shape()
TILE_BYTES = 3 * SHAPE.tile_size**2
TOKEN_BYTES = 4 * SHAPE.size
COUNT = 12
COST = CostModel(steps=2e-3, rows=1e-4, reads=1e-7, tokens=2e-4, pairs=1e-6, tiles=4e-3)

CRAMPED = {
    "one token at a time": {"max_num_batched_tokens": 1},
    "chunks of seven": {"max_num_batched_tokens": 7, "block_size": 3, "num_kv_blocks": 300},
    "few blocks": {"num_kv_blocks": 20, "block_size": 4},
    "few pictures": {"encoder_cache_bytes": 5 * TOKEN_BYTES, "max_num_encoder_tiles": 1},
    "little time": {"step_budget_ms": 5},
    "no time": {"step_budget_ms": 0.1, "block_size": 3, "num_kv_blocks": 300},
    "few of everything": {
        "step_budget_ms": 4,
        "max_num_batched_tokens": 9,
        "max_num_seqs": 3,
        "num_kv_blocks": 19,
        "block_size": 4,
        "encoder_cache_bytes": 5 * TOKEN_BYTES,
        "max_num_encoder_tiles": 2,
    },
}


def requests() -> list[tuple[EngineRequest, list[bytes]]]:
    """Text and up to three pictures each, some shared between requests; half of them sampled,
    and half of all with everything that depends on the tokens before."""
    made = []
    for number in range(COUNT):
        source = random.Random(number)
        prompt = [source.randrange(200) for _ in range(1 + source.randrange(9))]
        items, buffers = [], []
        for _ in range(number % 4):
            seed, tiles = source.randrange(5), 1 + source.randrange(3)
            length = tiles * SHAPE.tokens_per_tile
            items.append(
                VisionItem(b"%d %d" % (seed, tiles), len(prompt), length, tiles, len(buffers))
            )
            buffers.append(random.Random(seed).randbytes(tiles * TILE_BYTES))
            prompt += [IMAGE_TOKEN] * length
            prompt += [source.randrange(200) for _ in range(source.randrange(5))]
        sampling = SamplingParams(temperature=float(number % 2), seed=number, max_tokens=24)
        if number % 4 > 1:
            sampling = msgspec.structs.replace(
                sampling,
                repetition_penalty=1.3,
                presence_penalty=0.5,
                frequency_penalty=0.5,
                bad_words=((7,), (3, 5)),
                stop_token_ids=(11, 12, 13),
                min_tokens=22,
            )
        made.append((EngineRequest(f"r{number}", prompt, sampling, items), buffers))
    return made


def renamed(when: str) -> list[tuple[EngineRequest, list[bytes]]]:
    """The same requests once more, ``when`` before their names."""
    return [
        (msgspec.structs.replace(request, id=f"{when} {request.id}"), buffers)
        for request, buffers in requests()
    ]


def run(
    folder: Path, batches: Sequence[Sequence[tuple[EngineRequest, list[bytes]]]], **settings: Any
) -> tuple[dict[str, list[int]], EngineCore]:
    """Serve batch after batch; tokens by request id. A step budget counts with ``COST``, whatever
    steps take: the same steps in every run."""
    values = {"num_kv_blocks": 128, "block_size": 16} | settings
    values = {"device": "cpu", "threads": 1, "step_budget_ms": 0} | values
    options = EngineSettings(model=str(folder), **values)
    runner = ModelRunner(options)
    core = EngineCore(options, runner, runner.ready())
    core._pace = Pace(COST)
    core._pace.learn = lambda *_: None  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {}
    for batch in batches:
        for request, buffers in batch:
            core.add(request, buffers)
        while (report := core.step()) is not None:
            core._scheduler.check()
            for output in report.outputs:
                assert output.finish_reason != "error", output
                tokens.setdefault(output.id, []).extend(output.token_ids)
    return tokens, core


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """Each request by itself, its prompt in one chunk and wholly computed, a token per step."""
    single = [[request] for request in requests()]
    tokens, core = run(folder, single, enable_prefix_caching=False, speculative_tokens=0)
    assert core._scheduler.stats.preemptions == 0
    assert len({tuple(row) for row in tokens.values()}) == COUNT
    return tokens


@pytest.mark.parametrize("mode", ["off", "on"])
def test_together_is_alone(folder: Path, alone: dict[str, list[int]], mode: str) -> None:
    tokens, core = run(folder, [requests()], async_scheduling=mode)
    assert tokens == alone
    assert core._scheduler.stats.steps < 2 * 24


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("block_size", [3, 16, 64])
def test_cached_is_uncached(
    folder: Path, alone: dict[str, list[int]], block_size: int, mode: str
) -> None:
    """The same requests again find their prefixes; each also goes on where its answer ended."""
    again = renamed("again")
    longer = [
        (
            msgspec.structs.replace(
                request, id=f"longer {request.id}", prompt=request.prompt + alone[request.id][:20]
            ),
            buffers,
        )
        for request, buffers in requests()
        if request.sampling.temperature == 0
    ]
    tokens, core = run(
        folder, [requests(), again, longer], block_size=block_size, async_scheduling=mode
    )
    assert {name: tokens[name] for name in alone} == alone
    assert {name: tokens[f"again {name}"] for name in alone} == alone
    for request, _ in longer:
        name = request.id.removeprefix("longer ")
        assert tokens[request.id][:4] == alone[name][20:]
    assert core._scheduler.stats.cached_tokens > 100


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("block_size", [3, 16])
def test_shared_in_one_step_is_alone(
    folder: Path, alone: dict[str, list[int]], block_size: int, mode: str
) -> None:
    """Of two equal prompts that start together the second reads what the first has just written."""
    twins = [*requests(), *renamed("twin")]
    tokens, core = run(folder, [twins], block_size=block_size, async_scheduling=mode)
    assert tokens == alone | {f"twin {name}": row for name, row in alone.items()}
    assert core._scheduler.stats.cached_tokens > 40


def test_what_a_broken_prompt_leaves_breaks_no_other(folder: Path) -> None:
    """One token's embedding is not a number. Who shows it is gone before anything is drawn; another
    prompt has what stands before it in the same block."""
    options = EngineSettings(model=str(folder), device="cpu", threads=1, max_num_batched_tokens=16)
    runner = ModelRunner(options)
    runner._model.decoder.embedding.weight.data[199] = torch.nan
    core = EngineCore(options, runner, runner.ready())
    start, sampling = [*range(8)], SamplingParams(max_tokens=2)
    core.add(EngineRequest("broken", [*start, *[199] * 16], sampling))
    core.step()
    core.abort(["broken"])
    core.add(EngineRequest("other", [*start, 9], sampling))
    outputs = []
    while (report := core.step()) is not None:
        outputs += report.outputs
    assert [(output.id, output.error) for output in outputs] == [("other", None)] * 2


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("settings", CRAMPED.values(), ids=CRAMPED.keys())
def test_cramped_is_alone(
    folder: Path, alone: dict[str, list[int]], settings: dict[str, float], mode: str
) -> None:
    tokens, core = run(folder, [requests()], **settings, async_scheduling=mode)
    assert tokens == alone
    if settings.get("num_kv_blocks", 300) < 128:
        assert core._scheduler.stats.preemptions > 0


@pytest.mark.parametrize("mode", ["off", "on"])
def test_aborting_some_changes_nothing_for_the_others(
    folder: Path, alone: dict[str, list[int]], mode: str
) -> None:
    options = EngineSettings(
        model=str(folder),
        device="cpu",
        threads=1,
        num_kv_blocks=24,
        block_size=4,
        async_scheduling=mode,
    )
    runner = ModelRunner(options)
    core = EngineCore(options, runner, runner.ready())
    for request, buffers in requests():
        core.add(request, buffers)
    tokens: dict[str, list[int]] = {}
    steps = 0
    while (report := core.step()) is not None:
        for output in report.outputs:
            tokens.setdefault(output.id, []).extend(output.token_ids)
        steps += 1
        if steps % 3 == 0:
            core.abort([f"r{steps // 3 * 2}"])
    kept = {f"r{number}" for number in range(1, COUNT, 2)}
    assert {name: tokens[name] for name in kept} == {name: alone[name] for name in kept}
    assert core._scheduler.stats.blocks_used == 0
