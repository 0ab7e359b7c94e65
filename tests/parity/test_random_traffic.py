"""Random requests that come, and are given up, at random moments: in the C of the CPU's steps every
answer is the one it has alone, without a cache and with no token on trial."""

import dataclasses
import random
from pathlib import Path

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.parity import test_native
from wire.messages import EngineRequest, pack
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

ROUNDS = 30
IDS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("half")
    return make_checkpoint(made, shape=test_native.SHAPE, dtype=torch.bfloat16)


def settings(draw: random.Random, folder: Path, kind: str) -> EngineSettings:
    """Little or much of everything."""
    return EngineSettings(
        model=str(folder),
        device="cpu",
        dtype="bfloat16",
        threads=1,
        quantization=kind,
        max_model_len=200,
        block_size=draw.choice([32, 64]),
        num_kv_blocks=draw.choice([8, 12, 40, 200]),
        max_num_seqs=draw.randint(1, 9),
        max_num_batched_tokens=draw.choice([3, 7, 16, 64, 512]),
        speculative_tokens=draw.choice([1, 3, 5, 20, 64]),
    )


def requests(draw: random.Random) -> list[EngineRequest]:
    """Prompts that share their beginning with others, drawn in several ways."""
    starts = [draw.choices(range(IDS), k=80) for _ in range(2)]
    made = []
    for index in range(draw.randint(2, 24)):
        prompt = draw.choice(starts)[: draw.choice([1, 20, 32, 33, 64, 65, 79])]
        prompt = prompt + draw.choices(range(IDS), k=draw.choice([0, 0, 1, 3]))
        how = draw.choice(
            [
                SamplingParams(temperature=0.0),
                SamplingParams(temperature=0.7, seed=index),
                SamplingParams(top_p=0.9, frequency_penalty=0.3, logprobs=2, seed=index),
            ]
        )
        how = msgspec.structs.replace(how, max_tokens=draw.choice([1, 2, 5, 20, 60]))
        made.append(EngineRequest(f"{index}", prompt, how))
    return made


def step(core: EngineCore, found: dict[str, list[int]]) -> bool:
    """Whether there was something to do."""
    report = core.step()
    for output in report.outputs if report is not None else ():
        assert output.error is None
        found.setdefault(output.id, []).extend(output.token_ids)
    return report is not None


def predicted(draw: random.Random, request: EngineRequest, answer: list[int]) -> EngineRequest:
    """Its answer, as far as that is known to who asks."""
    wrong = draw.choice([0, 0.1, 0.5, 1])
    ids = [draw.randrange(IDS) if draw.random() < wrong else token for token in answer]
    return msgspec.structs.replace(request, prediction=pack(ids))


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_every_answer_is_the_one_it_has_alone(folder: Path, kind: str) -> None:
    draw, accepted = random.Random(kind), 0
    for _ in range(ROUNDS):
        options = settings(draw, folder, kind)
        runner = ModelRunner(options)
        plain = dataclasses.replace(options, speculative_tokens=0, enable_prefix_caching=False)
        one_by_one, core = (EngineCore(each, runner, runner.ready()) for each in (plain, options))
        alone, found = dict[str, list[int]](), dict[str, list[int]]()
        waiting, given_up = requests(draw), set[str]()
        for request in waiting:
            one_by_one.add(request)
            while step(one_by_one, alone):
                pass
        while waiting or core.has_work:
            for _ in range(min(draw.choice([0, 0, 0, 1, 2, 9]), len(waiting))):
                request = waiting.pop()
                core.add(predicted(draw, request, alone[request.id]))
            if draw.random() < 0.02 and found:
                given_up.add(draw.choice(list(found)))
                core.abort(list(given_up))
            step(core, found)
        for name, tokens in alone.items():
            had = found.get(name, [])
            assert had == tokens or (name in given_up and tokens[: len(had)] == had), options
        accepted += core._scheduler.stats.accepted_tokens
    assert accepted > 10 * ROUNDS
