"""Tensor parallelism over real processes: two and four ranks answer as one does, and each reads and
holds its share of the model alone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.core import EngineCore, Runner
from engine.runner import ModelRunner
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.ranks import Together, Workers
from tests.parity.test_scheduled import requests
from wire.messages import EngineRequest, PromptLogprobs
from wire.settings import EngineSettings

SIZES = (2, 4)
# Sums in another order. What log-probabilities differ by in fp32, and in bf16 on average.
EXACT, ROUNDED = 1e-4, 2e-2
# Two key heads for four ranks, and a vocabulary of which the last of four ranks has none.
QWEN2 = Shape(heads=8, head_dim=16, vocab=517)
SHAPES = {
    "Qwen2, padded": QWEN2,
    "tied": dataclasses.replace(QWEN2, tied=True),
    "InternLM2, biases": dataclasses.replace(
        QWEN2, backbone="InternLM2ForCausalLM", kv_heads=4, out_bias=True
    ),
    "Qwen3, biases": dataclasses.replace(
        QWEN2, backbone="Qwen3ForCausalLM", text_bias=True, out_bias=True, vocab=512
    ),
    "mixture": dataclasses.replace(
        QWEN2, backbone="Qwen3MoeForCausalLM", text_bias=False, experts=6, dense_layers=(1,)
    ),
}
FORMATS = {"InternLM2, biases": "chat", "tied": "chat"}
CRAMPED = {"num_kv_blocks": 24, "block_size": 4, "max_num_batched_tokens": 11}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers(max(SIZES) - 1)
    yield workers
    workers.close()


Meeting = Any  # the arguments of ``Together`` before its settings


@pytest.fixture(scope="module", params=SIZES)
def meeting(workers: Workers, request: pytest.FixtureRequest) -> Iterator[Meeting]:
    group, pipes = workers.meet(request.param)
    yield group, pipes
    group.leave()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parallel")
    return {
        name: make_checkpoint(root / name, shape=shape, format=FORMATS.get(name, "hf"), shards=2)
        for name, shape in SHAPES.items()
    }


def settings(folder: Path, **other: Any) -> EngineSettings:
    values = {"num_kv_blocks": 300, "block_size": 16, "max_num_batched_tokens": 96} | other
    return EngineSettings(str(folder), device="cpu", threads=1, step_budget_ms=0, **values)


def asked() -> list[tuple[EngineRequest, list[bytes]]]:
    """Of the scheduler's tests; some ask for log-probabilities too."""
    found = []
    for index, (request, buffers) in enumerate(requests()):
        also = {} if index % 3 else {"logprobs": 4, "prompt_logprobs": 3}
        sampling = msgspec.structs.replace(request.sampling, **also)
        found.append((msgspec.structs.replace(request, sampling=sampling), buffers))
    return found


@dataclasses.dataclass
class Answers:
    tokens: dict[str, list[int]]
    drawn: dict[str, list[float]]
    prompts: dict[str, list[PromptLogprobs]]
    preemptions: int

    def equal(self, other: "Answers", tolerance: float) -> None:
        assert self.tokens == other.tokens
        assert self.drawn.keys() == other.drawn.keys()
        for name, values in self.drawn.items():
            assert values == pytest.approx(other.drawn[name], abs=tolerance)
        assert self.prompts.keys() == other.prompts.keys()
        for name, entries in self.prompts.items():
            for ours, theirs in zip(entries, other.prompts[name], strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=tolerance)
                best = [value for _, value in theirs.top]
                assert [value for _, value in ours.top] == pytest.approx(best, abs=tolerance)


def answers(runner: Runner, options: EngineSettings) -> Answers:
    core = EngineCore(options, runner, runner.ready())
    found = Answers({}, {}, {}, 0)
    for item in asked():
        core.add(*item)
    while (report := core.step()) is not None:
        for output in report.outputs:
            assert output.finish_reason != "error", output
            found.tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.logprobs:
                values = [entry.logprob for entry in output.logprobs]
                found.drawn.setdefault(output.id, []).extend(values)
            if output.prompt_logprobs is not None:
                found.prompts[output.id] = output.prompt_logprobs
    found.preemptions = core._scheduler.stats.preemptions
    return found


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Answers]:
    """What one rank answers."""
    found = {}
    for name, folder in folders.items():
        options = settings(folder)
        found[name] = answers(ModelRunner(options), options)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_answers_as_on_one_rank(
    meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers], name: str
) -> None:
    options = settings(folders[name])
    found = answers(Together(*meeting, options), options)
    found.equal(alone[name], EXACT)
    assert len({token for tokens in found.tokens.values() for token in tokens}) > 50
    assert found.prompts


@pytest.mark.parametrize("pipelined", ["off", "on"])
def test_chunks_preemption_and_overlap_change_nothing(
    meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers], pipelined: str
) -> None:
    name = "Qwen2, padded"
    options = settings(folders[name], async_scheduling=pipelined, **CRAMPED)
    found = answers(Together(*meeting, options), options)
    found.equal(alone[name], EXACT)
    assert found.preemptions > 0
