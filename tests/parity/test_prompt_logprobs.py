"""Log-probabilities of the prompt: transformers' at every position, however it was computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.core import EngineCore
from engine.runner import ModelRunner
from tests.checkpoints import IMAGE_TOKEN, Shape, make_checkpoint
from tests.parity.direct import prompt
from tests.parity.reference import Reference
from tests.parity.test_transformers import TOLERANCE
from wire.messages import EngineRequest, PromptLogprobs, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

SHAPE = Shape()
PROMPTS = [prompt(SHAPE, tiles, seed=n) for n, tiles in enumerate([[], [1], [2, 1], [], [1, 1]])]
PROMPTS.append((prompt(SHAPE, [], seed=9)[0] * 20, None))  # longer than is looked up at once
LIKELIEST = 3

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of five": {"max_num_batched_tokens": 5},
    "one position at a time, pipelined": {"max_num_batched_tokens": 1, "async_scheduling": "on"},
    "few blocks": {"num_kv_blocks": 48, "block_size": 4, "max_num_batched_tokens": 40},
    "few blocks, pipelined": {
        "num_kv_blocks": 48,
        "block_size": 4,
        "max_num_batched_tokens": 9,
        "async_scheduling": "on",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Tensor]:
    """float64 log-probabilities ``[tokens, vocab]`` of each prompt."""
    reference = Reference(folder)
    return [reference.logits(*item).double().log_softmax(-1) for item in PROMPTS]


def request(name: str, index: int, likeliest: int) -> tuple[EngineRequest, list[bytes]]:
    ids, pixels = PROMPTS[index]
    items, buffers, at = [], [], 0
    for tile in pixels if pixels is not None else ():
        at = ids.index(IMAGE_TOKEN, at)
        digest = tile.numpy().tobytes()
        items.append(VisionItem(digest[:32], at, SHAPE.tokens_per_tile, 1, len(buffers)))
        buffers.append(digest)
        at += SHAPE.tokens_per_tile
    sampling = SamplingParams(temperature=0.0, max_tokens=40, prompt_logprobs=likeliest)
    return EngineRequest(name, ids, sampling, items), buffers


def serve(
    core: EngineCore, requests: list[tuple[EngineRequest, list[bytes]]]
) -> tuple[dict[str, list[PromptLogprobs]], dict[str, list[int]]]:
    scores: dict[str, list[PromptLogprobs]] = {}
    tokens: dict[str, list[int]] = {}
    for item in requests:
        core.add(*item)
    while (report := core.step()) is not None:
        for output in report.outputs:
            assert output.finish_reason != "error", output
            if output.prompt_logprobs is not None:
                assert output.id not in tokens, "not in the first output, or twice"
                scores[output.id] = output.prompt_logprobs
            tokens.setdefault(output.id, []).extend(output.token_ids)
    return scores, tokens


def make_core(folder: Path, **settings: Any) -> EngineCore:
    values = {"num_kv_blocks": 256, "block_size": 16} | settings
    values = {"threads": 1, "device": "cpu"} | values
    options = EngineSettings(model=str(folder), **values)
    runner = ModelRunner(options)
    return EngineCore(options, runner, runner.ready())


def assert_equal(found: list[PromptLogprobs], expected: Tensor, ids: list[int]) -> None:
    assert len(found) == len(ids) - 1
    for entry, row, token in zip(found, expected, ids[1:], strict=False):
        own = row[token].item()
        assert entry.logprob == pytest.approx(own, abs=TOLERANCE)
        # As many are likelier, whatever the tolerance makes of those that are about as likely.
        assert (row > own + TOLERANCE).sum() < entry.rank <= (row >= own - TOLERANCE).sum()
        assert len(entry.top) == LIKELIEST
        best = row.topk(LIKELIEST).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=TOLERANCE)
        assert [row[name].item() for name, _ in entry.top] == pytest.approx(best, abs=TOLERANCE)


@pytest.mark.parametrize("name", SETTINGS)
def test_they_equal_the_reference(folder: Path, expected: list[Tensor], name: str) -> None:
    core = make_core(folder, **SETTINGS[name])
    asked = range(len(PROMPTS))
    scores, _ = serve(core, [request(f"r{i}", i, LIKELIEST) for i in asked])
    for i in asked:
        assert_equal(scores[f"r{i}"], expected[i], PROMPTS[i][0])
    if "blocks" in name:
        assert core._scheduler.stats.preemptions > 0


def test_what_is_cached_is_computed_again_for_them_and_for_nobody_else(
    folder: Path, expected: list[Tensor]
) -> None:
    core = make_core(folder, block_size=4)
    asked = range(len(PROMPTS))
    _, first = serve(core, [request(f"plain {i}", i, -1) for i in asked])
    before = core._scheduler.stats.cached_tokens
    scores, again = serve(core, [request(f"plain {i}", i, LIKELIEST) for i in asked])
    assert core._scheduler.stats.cached_tokens == before
    for i in asked:
        assert_equal(scores[f"plain {i}"], expected[i], PROMPTS[i][0])
    none, third = serve(core, [request(f"plain {i}", i, -1) for i in asked])
    assert core._scheduler.stats.cached_tokens > before
    assert not none
    assert first == again == third


def test_the_logits_of_a_long_prompt_are_not_held_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(folder, max_num_seqs=24)
    model = core._runner._model
    rows: list[int] = []
    logits = model.logits

    def watch(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model, "logits", watch)
    with torch.inference_mode():
        serve(core, [request("long", len(PROMPTS) - 1, 0)])
    assert len(PROMPTS[-1][0]) > 128
    assert max(rows) == 24
