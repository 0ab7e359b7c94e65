"""Tokens on trial over the real model: right or wrong, they change no token and no
log-probability of any request, however these are drawn."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.plan import StepPlan
from engine.runner import ModelRunner
from engine.speculation import max_draws
from tests.checkpoints import make_checkpoint
from tests.parity import test_native
from tests.parity.test_on_a_device import THERE, without_kernels
from tests.parity.test_scheduled import CRAMPED, SHAPE, requests, run
from tests.replay import MaskedAttention, Replays
from tests.standin import standin
from wire.messages import EngineOutput, EngineRequest, TokenLogprobs, pack
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

Asked = list[tuple[EngineRequest, list[bytes]]]

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16", "block_size": 32, "threads": 2},
    "int8": {"quantization": "int8", "block_size": 32, "threads": 2},
}
NATIVE = {"max_num_batched_tokens": 7, "num_kv_blocks": 6, "max_num_seqs": 5}
CASES = [("float32", case) for case in CRAMPED.values()]
CASES += [("bfloat16", NATIVE), ("int8", NATIVE)]
NONE: dict[str, Any] = {"speculative_tokens": 0, "enable_prefix_caching": False}
used = without_kernels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    single = make_checkpoint(tmp_path_factory.mktemp("single"), shape=SHAPE)
    half = tmp_path_factory.mktemp("half")
    half = make_checkpoint(half, shape=test_native.SHAPE, dtype=torch.bfloat16)
    return {"float32": single, "bfloat16": half, "int8": half}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], kind: str) -> dict[str, list[int]]:
    """Every way to draw, one request after the other, and a token per step."""
    single = [[request] for request in requests()]
    tokens, core = run(folders[kind], single, **KINDS[kind] | NONE)
    assert core._scheduler.stats.speculated_tokens == 0
    return tokens


def predicted(alone: dict[str, list[int]], wrong: int) -> Asked:
    """Requests that predict their own answers, but for every ``wrong``-th token."""
    return [
        (
            msgspec.structs.replace(
                request,
                prediction=pack(
                    token if place % wrong else (token + 1) % 200
                    for place, token in enumerate(alone[request.id], 1)
                ),
            ),
            buffers,
        )
        for request, buffers in requests()
    ]


@pytest.mark.parametrize("wrong", [2, 5, 99])
def test_tokens_are_those_without_it(
    folders: dict[str, Path], kind: str, alone: dict[str, list[int]], wrong: int
) -> None:
    one_by_one = [[each] for each in predicted(alone, wrong)]
    tokens, core = run(folders[kind], one_by_one, speculative_tokens=5, **KINDS[kind])
    assert tokens == alone
    stats = core._scheduler.stats
    assert 0 < stats.accepted_tokens <= stats.speculated_tokens
    if wrong == 99:
        assert stats.steps < sum(map(len, alone.values())) / 3


@pytest.mark.parametrize(("kind", "case"), CASES, indirect=["kind"])
def test_nor_does_it_matter_what_there_is_little_of(
    folders: dict[str, Path], kind: str, alone: dict[str, list[int]], case: dict[str, Any]
) -> None:
    settings = KINDS[kind] | {"speculative_tokens": 30} | case
    tokens, core = run(folders[kind], [predicted(alone, 5)], **settings)
    assert tokens == alone
    if settings.get("max_num_batched_tokens", 99) > 1:
        assert core._scheduler.stats.accepted_tokens > 0


def logprobs(core: EngineCore, asked: Asked) -> dict[str, list[TokenLogprobs]]:
    found: dict[str, list[TokenLogprobs]] = {}
    several = 0

    def take(output: EngineOutput) -> None:
        nonlocal several
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
        several += len(output.token_ids) > 1
        found.setdefault(output.id, []).extend(output.logprobs)

    for request, buffers in asked:
        sampling = msgspec.structs.replace(request.sampling, logprobs=3)
        core.add(msgspec.structs.replace(request, sampling=sampling), buffers)
        while (report := core.step()) is not None:
            for output in report.outputs:
                take(output)
    assert (several > 0) == bool(core._scheduler.stats.accepted_tokens)
    return found


def test_log_probabilities_are_those_without_it_too(
    folders: dict[str, Path], kind: str, alone: dict[str, list[int]]
) -> None:
    _, plain = run(folders[kind], [], **KINDS[kind] | NONE)
    _, core = run(folders[kind], [], **KINDS[kind])
    asked = predicted(alone, 5)
    expected, found = logprobs(plain, asked), logprobs(core, asked)
    assert core._scheduler.stats.accepted_tokens > 0
    assert found.keys() == expected.keys()
    for name, entries in expected.items():
        for one, other in zip(entries, found[name], strict=True):
            # Torch adds up rows of different numbers in different orders, the C does not.
            assert other.logprob == pytest.approx(one.logprob, abs=1e-5 * (kind == "float32"))
            assert [token for token, _ in other.top] == [token for token, _ in one.top]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_as_many_as_may_come_in_beside_them(
    folders: dict[str, Path], kind: str, temperature: float
) -> None:
    """One answer is tried while five prompts, of which all but a token is cached, enter in the same
    step: nothing draws for more rows."""
    seqs = 6
    settings = EngineSettings(
        **{"model": str(folders[kind]), "block_size": 32} | KINDS[kind],
        max_num_seqs=seqs,
        num_kv_blocks=64,
        device="cpu",
    )
    runner, drawn = ModelRunner(settings), []
    shared = [(7 * place) % 150 for place in range(33)]

    def asked(number: int, count: int, answer: list[int]) -> EngineRequest:
        how = SamplingParams(max_tokens=count, temperature=temperature, seed=number)
        prompt = shared if number else shared[3:]
        return EngineRequest(f"{number}", prompt, how, prediction=pack(answer))

    def finish(core: EngineCore) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        while (report := core.step()) is not None:
            for output in report.outputs:
                assert output.error is None
                found.setdefault(output.id, []).extend(output.token_ids)
        return found

    plain = EngineCore(dataclasses.replace(settings, **NONE), runner, runner.ready())
    expected = dict[str, list[int]]()
    for number in range(seqs):
        plain.add(asked(number, 3 if number else 40, []))
        expected |= finish(plain)
    core = EngineCore(settings, runner, runner.ready())
    core.add(asked(1, 1, []))
    finish(core)  # its prompt is cached
    core.add(asked(0, 40, expected["0"]))
    begin, found = runner.begin, list[EngineOutput]()

    def note(plan: StepPlan) -> None:
        drawn.append(sum(work.sample + len(work.speculated) for work in plan.work))
        begin(plan)

    runner.begin = note  # type: ignore[method-assign]
    while max(drawn, default=0) < 6:
        report = core.step()
        assert report is not None
        found += report.outputs
    for number in range(1, seqs):
        core.add(asked(number, 3, []))
    tokens = finish(core)
    tokens["0"] = [token for output in found for token in output.token_ids] + tokens["0"]
    assert tokens == expected
    assert max(drawn) == max_draws(settings, "cpu") == seqs + 5


def test_what_wrong_tokens_leave_breaks_no_other(folders: dict[str, Path]) -> None:
    """One token's embedding is not a number, and behind where the C looks a prediction has it: who
    predicted it gets what a prompt with it would. Another prompt begins in the same block."""
    values = KINDS["bfloat16"] | {"block_size": 64, "num_kv_blocks": 8, "device": "cpu"}
    options = EngineSettings(model=str(folders["bfloat16"]), **values)
    runner = ModelRunner(options)
    runner._model.decoder.embedding.weight.data[199] = torch.nan

    def ask(core: EngineCore, request: EngineRequest) -> tuple[list[int], str | None]:
        core.add(request)
        found, error = list[int](), None
        while (report := core.step()) is not None:
            for output in report.outputs:
                found, error = found + output.token_ids, output.error
        return found, error

    prompt, four = [(7 * place) % 150 for place in range(31)], SamplingParams(max_tokens=4)
    uncached = EngineSettings(model=options.model, **values | NONE)
    plain, core = (EngineCore(each, runner, runner.ready()) for each in (uncached, options))
    (first, second, *_), _ = ask(plain, EngineRequest("plain", prompt, four))
    stop = SamplingParams(max_tokens=9, stop_token_ids=(second,))
    bad = EngineRequest("bad", prompt, stop, prediction=pack([first, 199, 199, 199]))
    assert ask(core, bad) == ([first], "the model's output is not a number")
    assert core._scheduler.stats.speculated_tokens > 0
    other = [*prompt, first, 9]
    expected, _ = ask(plain, EngineRequest("plain", other, four))
    assert ask(core, EngineRequest("other", other, four)) == (expected, None)


@pytest.fixture
def by_itself(folders: dict[str, Path]) -> dict[str, list[int]]:
    tokens, _ = run(folders["float32"], [[each] for each in requests()], **NONE)
    return tokens


def test_a_device_beside_the_host_may_try_tokens_too(
    folders: dict[str, Path], by_itself: dict[str, list[int]]
) -> None:
    """Where that was asked for."""
    asked = [[each] for each in predicted(by_itself, 5)]
    with standin() as device:
        tokens, core = run(folders["float32"], asked, speculative_tokens=5, **THERE)
    assert tokens == by_itself
    assert core._scheduler.stats.accepted_tokens > 0
    assert "event in runner.py finish" in device.waits


@pytest.mark.parametrize("seqs", [1, 8])
def test_steps_with_tokens_on_trial_are_replayed(
    folders: dict[str, Path],
    by_itself: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    seqs: int,
) -> None:
    """Even where a step holds more of them than there may be sequences."""
    replays = Replays()
    monkeypatch.setattr("engine.runner.capture_on", lambda device: replays)
    monkeypatch.setattr("engine.runner.choose", lambda name, config, *_: MaskedAttention(config))
    asked = [[each] for each in predicted(by_itself, 5)]
    tokens, core = run(folders["float32"], asked, speculative_tokens=5, max_num_seqs=seqs)
    assert tokens == by_itself
    stats = core._scheduler.stats
    assert stats.accepted_tokens > 0
    assert replays.count > stats.steps / 2
