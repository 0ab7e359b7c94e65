"""Log-probabilities of the prompt: transformers' at every position, however it was computed."""

from pathlib import Path
from typing import Any

import msgspec
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
from wire.sampling import Lookup, SamplingParams
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


def looked_up(name: str, index: int) -> tuple[EngineRequest, list[bytes]]:
    """Few positions, the first and the last that can be among them, and as many tokens as differ
    from request to request."""
    plain, buffers = request(name, index, -1)
    last = len(plain.prompt) - 2
    lookup = Lookup((0, last // 2, last - 1, last), tuple(range(3, 5 + index)))
    sampling = msgspec.structs.replace(plain.sampling, lookup=lookup)
    return msgspec.structs.replace(plain, sampling=sampling), buffers


def assert_found(found: list[PromptLogprobs], expected: Tensor, asked: EngineRequest) -> None:
    lookup = asked.sampling.lookup
    assert lookup is not None
    assert len(found) == len(lookup.at)
    for entry, position in zip(found, lookup.at, strict=True):
        row = expected[position]
        own = row[asked.prompt[position + 1]].item()
        assert entry.logprob == pytest.approx(own, abs=TOLERANCE)
        assert tuple(name for name, _ in entry.top) == lookup.ids
        values = [row[name].item() for name in lookup.ids]
        assert [value for _, value in entry.top] == pytest.approx(values, abs=TOLERANCE)


@pytest.mark.parametrize("name", SETTINGS)
def test_named_tokens_are_looked_up_at_named_positions(
    folder: Path, expected: list[Tensor], name: str
) -> None:
    core = make_core(folder, **SETTINGS[name])
    asked = [looked_up(f"r{i}", i) for i in range(len(PROMPTS))]
    mixed = [request(f"all {i}", i, LIKELIEST) for i in (0, 3)]
    scores, _ = serve(core, [*asked[:3], *mixed, *asked[3:]])
    for i, (sent, _) in enumerate(asked):
        assert_found(scores[sent.id], expected[i], sent)
    for i, (sent, _) in zip((0, 3), mixed, strict=True):
        assert_equal(scores[sent.id], expected[i], sent.prompt)
    if "blocks" in name:
        assert core._scheduler.stats.preemptions > 0


def test_a_lookup_finds_in_the_cache_what_is_before_it_and_computes_the_rest(
    folder: Path, expected: list[Tensor]
) -> None:
    core = make_core(folder, block_size=4)
    index = len(PROMPTS) - 1
    plain, buffers = request("plain", index, -1)
    serve(core, [(plain, buffers)])
    at = (101, len(plain.prompt) - 2)
    sampling = msgspec.structs.replace(plain.sampling, lookup=Lookup(at, (3, 4)))
    sent = msgspec.structs.replace(plain, id="again", sampling=sampling)
    scores, _ = serve(core, [(sent, buffers)])
    assert core._scheduler.stats.cached_tokens == 100
    assert_found(scores["again"], expected[index], sent)


@pytest.mark.parametrize("lookup", [Lookup((5, 4), (3,)), Lookup((10**6,), (3,)), Lookup((1,), ())])
def test_a_lookup_of_what_is_not_there_is_refused(folder: Path, lookup: Lookup) -> None:
    core = make_core(folder)
    plain, _ = request("wrong", 0, -1)
    sampling = msgspec.structs.replace(plain.sampling, lookup=lookup)
    core.add(msgspec.structs.replace(plain, sampling=sampling), [])
    report = core.step()
    assert report is not None
    assert [output.finish_reason for output in report.outputs] == ["error"]


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
