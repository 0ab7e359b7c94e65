"""Tensor parallelism over real processes: two and four ranks answer as one does, and each reads and
holds its share of the model alone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine import runner
from engine.core import EngineCore, Runner
from engine.runner import ModelRunner
from model import CheckpointError, InternVL, build_model, load_config, weights
from model.awq import Int4Linear
from model.native import LIBRARY
from model.parallel import Group, share
from tests.checkpoints import INTERNVL3, Shape, make_checkpoint
from tests.parity.ranks import CPU, Together, Workers
from tests.parity.test_scheduled import requests
from tests.replay import MaskedAttention, Replays
from tests.unit import test_awq
from wire.messages import EngineRequest, PromptLogprobs
from wire.sampling import Lookup, SamplingParams
from wire.settings import EngineSettings

SIZES = (2, 4)
# Of log-probabilities in fp32, whose sums are made in another order.
EXACT = 1e-4
# Of the error that rounding or quantising makes of them on one rank, and how much of it several
# ranks may have: their parts are rounded and quantised each by itself.
LIKE_ONE = 1.5
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
# The C wants sizes like these on each rank.
WIDE = Shape(vision_size=64, heads=4, kv_heads=4, head_dim=64, mlp=512, size=128)
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
        also: dict[str, Any] = {} if index % 3 else {"logprobs": 4, "prompt_logprobs": 3}
        if index % 3 == 1 and len(request.prompt) > 3:
            also = {"lookup": Lookup(at=(0, 2), ids=(5, 500))}
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


def answers(model: Runner, options: EngineSettings) -> Answers:
    core = EngineCore(options, model, model.ready())
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


@pytest.mark.parametrize(("meeting", "pipelined"), [(2, "off"), (4, "on")], indirect=["meeting"])
def test_chunks_preemption_and_overlap_change_nothing(
    meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers], pipelined: str
) -> None:
    name = "Qwen2, padded"
    options = settings(folders[name], async_scheduling=pipelined, **CRAMPED)
    found = answers(Together(*meeting, options), options)
    found.equal(alone[name], EXACT)
    assert found.preemptions > 0


def replay() -> None:
    """Steps are replayed, CUDA being stood in for."""
    runner.capture_on = lambda device: Replays()
    runner.choose = lambda name, config, *_: MaskedAttention(config)


def compute() -> None:
    runner.capture_on, runner.choose = EAGER


EAGER = runner.capture_on, runner.choose


@pytest.mark.parametrize("meeting", [2], indirect=True)
def test_steps_are_replayed_on_all_ranks(
    workers: Workers, meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers]
) -> None:
    options = settings(folders["tied"], async_scheduling="on")
    try:
        workers.do(replay, 2)
        replay()
        found = answers(Together(*meeting, options), options)
    finally:
        workers.do(compute, 2)
        compute()
    found.equal(alone["tied"], EXACT)


def test_no_rank_goes_on_without_graphs_that_others_may_have(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(function: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "capture_on", lambda device: fails)
    with pytest.raises(RuntimeError, match="--cuda-graphs false goes without"):
        ModelRunner(settings(folders["tied"]), group=Place(0, 2))


def scores(model: Runner, options: EngineSettings) -> Tensor:
    """Log-probabilities of the tokens of prompts, which no draw changes."""
    core = EngineCore(options, model, model.ready())
    for request, buffers in requests():
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
        core.add(msgspec.structs.replace(request, sampling=sampling), buffers)
    found: dict[str, list[float]] = {}
    while (report := core.step()) is not None:
        for output in report.outputs:
            found[output.id] = [entry.logprob for entry in output.prompt_logprobs or []]
    return torch.tensor([value for name in sorted(found) for value in found[name]])


def exactly(folder: Path, **other: Any) -> Tensor:
    """What one rank finds."""
    options = settings(folder, **other)
    return scores(ModelRunner(options), options)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), shape=WIDE)


PRECISIONS = [
    (2, {"dtype": "bfloat16", "block_size": 32}),
    (4, {"dtype": "bfloat16", "block_size": 32}),
    (4, {"quantization": "int8", "block_size": 32}),
    (2, {"quantization": "bnb-8bit"}),
    (2, {"quantization": "bnb-4bit"}),
]


def names(own: ModelRunner) -> tuple[str, str]:
    return own._model.ops.name, own._attention.name


@pytest.mark.parametrize(("meeting", "precision"), PRECISIONS, indirect=["meeting"])
def test_precisions_lose_no_more_than_on_one_rank(
    meeting: Meeting, wide: Path, precision: dict[str, Any]
) -> None:
    if "int8" in precision.values() and not LIBRARY:
        pytest.skip("there was no C compiler")
    options = settings(wide, **precision)
    ranks = Together(*meeting, options)
    if "block_size" in precision and LIBRARY:
        assert set(ranks.ask(names)) == {("native", "native")}
    found, exact = scores(ranks, options), exactly(wide)
    lost = (exactly(wide, **precision) - exact).abs().mean()
    assert 0 < (found - exact).abs().mean() < LIKE_ONE * lost


def test_weights_in_four_bits_are_cut_as_what_they_stand_for(
    meeting: Meeting, tmp_path: Path
) -> None:
    options = settings(test_awq.made(tmp_path, test_awq.INTERNLM))
    alone = answers(ModelRunner(options), options)
    answers(Together(*meeting, options), options).equal(alone, EXACT)


def test_four_bits_that_are_kept_are_cut_between_groups(meeting: Meeting, tmp_path: Path) -> None:
    shape = dataclasses.replace(test_awq.INTERNLM, mlp=128)
    folder = test_awq.made(tmp_path, shape)
    options = settings(folder, quantization="awq")
    alone = answers(ModelRunner(settings(folder)), options)
    ranks = Together(*meeting, options)
    answers(ranks, options).equal(alone, EXACT)
    assert ranks.ask(layers_in_four_bits) == [4 * shape.layers] * meeting[0].size


def layers_in_four_bits(own: ModelRunner) -> int:
    return sum(isinstance(layer, Int4Linear) for layer in own._model.modules())


def parameters(own: ModelRunner) -> tuple[int, int, int]:
    """Of the decoder and of all else, and bytes of the cache."""
    model, cache = own._model, own._kv
    held = sum(p.numel() for p in model.decoder.parameters())
    rest = sum(p.numel() for p in model.parameters()) - held
    return held, rest, sum(layer.nbytes for layer in cache.layers)


def test_each_rank_holds_its_share(meeting: Meeting, wide: Path) -> None:
    group, _ = meeting
    options = settings(wide)
    one = ModelRunner(options)
    held, rest, cache = parameters(one)
    ranks = Together(*meeting, options)
    norms = (2 * WIDE.layers + 1) * WIDE.size
    assert (
        ranks.ask(parameters)
        == [((held - norms) // group.size + norms, rest, cache // group.size)] * group.size
    )
    # Says so of the whole model.
    assert ranks.ready().parameters == one.ready().parameters
    assert ranks.ready().vocab_size == one.ready().vocab_size


class Place(Group):
    """A rank of a group that never meets: the others send what it has itself."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat([x] * self.size, dim)


def load(folder: Path, rank: int, size: int) -> InternVL:
    config = load_config(folder)
    return build_model(config, folder, device=CPU, dtype=torch.float32, group=Place(rank, size))


class Watched:
    """A safetensors file that only slices are taken of, and counts their bytes."""

    read = 0

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, key: str) -> "Watched":
        return Watched(self._file.get_slice(key))

    def get_shape(self) -> list[int]:
        return list(self._file.get_shape())

    def get_dtype(self) -> str:
        return str(self._file.get_dtype())

    def __getitem__(self, at: Any) -> Tensor:
        found: Tensor = self._file[at]
        Watched.read += found.nbytes
        return found


@pytest.mark.parametrize("name", SHAPES)
def test_each_rank_reads_its_share(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, size = folders[name], 4
    open_file = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda *a, **b: Watched(open_file(*a, **b)))
    read, models = [], []
    for rank in range(size):
        Watched.read = 0
        models.append(load(folder, rank, size))
        read.append(Watched.read)
    whole = load(folder, 0, 1)
    decoder = 4 * sum(p.numel() for p in whole.decoder.parameters())
    rest = 4 * sum(p.numel() for p in whole.parameters()) - decoder
    # Norms, routers and key heads are there more than once.
    for count in read:
        assert count - rest < 0.45 * decoder
    if SHAPES[name].kv_heads % size == 0:
        assert sum(count - rest for count in read) < 1.1 * decoder
    assert {model.parameter_count for model in models} == {whole.parameter_count}
    # Three ranks know all of 517 tokens, by 192 each.
    assert models[-1].decoder.embedding.weight.any() == (SHAPES[name].vocab == 512)


def test_shapes_are_compared_with_the_whole(tmp_path: Path) -> None:
    key = "model.language_model.layers.1.mlp.down_proj.weight"

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[key] = tensors[key][:, ::2].contiguous()

    folder = make_checkpoint(tmp_path, change=halve)
    with pytest.raises(CheckpointError, match=r"down_proj.weight is \[64, 48\] instead"):
        load(folder, 0, 2)


# What divides heads, key heads (or is divided by them) and the MLP of the published sizes.
POSSIBLE = {
    "1B": "1, 2", "2B": "1, 2, 4", "8B": "1, 2, 4", "9B": "1, 2, 4, 8, 16, 32",
    "14B": "1, 2, 4, 8", "38B": "1, 2, 4, 8", "78B": "1, 2, 4, 8, 16, 32, 64",
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tmp_path: Path, name: str) -> None:
    text = load_config(make_checkpoint(tmp_path, shape=INTERNVL3[name], weights=False)).text
    with pytest.raises(ValueError, match=f"size 3 does not .* possible: {POSSIBLE[name]}$"):
        share(text, 3)


def test_the_refusal_has_the_numbers(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPES["mixture"], expert_mlp=36)
    text = load_config(make_checkpoint(tmp_path, shape=shape, weights=False)).text
    expected = (
        "tensor_parallel_size 8 does not divide the model: it has 8 query heads, 2 key heads and "
        "MLPs 96 and 36 wide; possible: 1, 2, 4"
    )
    with pytest.raises(ValueError, match=expected):
        share(text, 8)


def memory(own: ModelRunner) -> tuple[int, int, int]:
    """Blocks of the cache, as told and as they are, and ranks that share the machine."""
    return own.ready().blocks_total, len(own._kv.layers[0]), own._model.group.neighbours


def test_the_cache_is_as_large_as_the_poorest_rank_can_have_it(
    meeting: Meeting, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, _ = meeting
    small = {"request_tile_bytes": 1, "encoder_cache_bytes": 1, "cpu_memory_utilization": 0.95}
    options = settings(wide, num_kv_blocks=0, **small)
    # For each that is in this rank's place; the others have what the machine has.
    monkeypatch.setattr("engine.memory.free_memory", lambda: group.size * (80 << 20))
    ranks = Together(*meeting, options)
    blocks = ranks.ready().blocks_total
    assert ranks.ask(memory) == [(blocks, blocks, group.size)] * group.size
    useful = options.max_num_seqs * (WIDE.positions // options.block_size)
    assert 1 < blocks < useful
