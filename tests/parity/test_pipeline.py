"""Pipeline parallelism over real processes: stages one behind the other answer as one rank does, to
the last bit where no layer is split, and each reads and holds its own layers alone."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import memory
from engine.runner import ModelRunner
from model import CheckpointError, InternVL, build_model, load_config, skeleton, weights
from model.native import LIBRARY
from model.parallel import Group
from model.stages import check_stages, own_layers, share_out
from tests.checkpoints import INTERNVL3, Shape, make_checkpoint
from tests.parity.ranks import CPU, Together, Workers
from tests.parity.test_parallel import (
    CRAMPED,
    EXACT,
    WIDE,
    Answers,
    Meeting,
    Watched,
    answers,
    compute,
    exactly,
    names,
    parameters,
    replay,
    scores,
    settings,
)
from tests.unit import test_awq

# Stages, and ranks of each.
GROUPS = [(2, 1), (3, 1), (2, 2)]
LAYERS = 6
QWEN2 = Shape(layers=LAYERS, heads=8, head_dim=16, vocab=517)
SHAPES = {
    "Qwen2": QWEN2,
    "tied": dataclasses.replace(QWEN2, tied=True),
    "InternLM2, biases": dataclasses.replace(
        QWEN2, backbone="InternLM2ForCausalLM", kv_heads=4, out_bias=True
    ),
    # Two thirds of two stages' layers, and a dense one that is not its stage's first.
    "mixture": dataclasses.replace(
        QWEN2, backbone="Qwen3MoeForCausalLM", text_bias=False, experts=6, dense_layers=(4,)
    ),
}
FORMATS = {"InternLM2, biases": "chat", "tied": "chat"}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers(max(stages * size for stages, size in GROUPS) - 1)
    yield workers
    workers.close()


@pytest.fixture(scope="module", params=GROUPS, ids=lambda pair: f"{pair[0]}x{pair[1]}")
def meeting(workers: Workers, request: pytest.FixtureRequest) -> Iterator[Meeting]:
    stages, size = request.param
    group, pipes = workers.meet(stages * size, stages)
    yield group, pipes
    group.leave()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipeline")
    return {
        name: make_checkpoint(root / name, shape=shape, format=FORMATS.get(name, "hf"), shards=2)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Answers]:
    """What one rank answers."""
    found = {}
    for name, folder in folders.items():
        options = settings(folder)
        found[name] = answers(ModelRunner(options), options)
    return found


def tolerance(meeting: Meeting) -> float:
    """Of log-probabilities: none where no sum is made by several ranks."""
    group, _ = meeting
    return EXACT if group.size > 1 else 0.0


RUNS = [((2, 1), "Qwen2"), ((2, 1), "mixture"), ((3, 1), "tied"), ((3, 1), "InternLM2, biases")]
RUNS += [((2, 2), "tied"), ((2, 2), "mixture")]


@pytest.mark.parametrize(("meeting", "name"), RUNS, indirect=["meeting"])
def test_every_architecture_answers_as_on_one_rank(
    meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers], name: str
) -> None:
    options = settings(folders[name])
    found = answers(Together(*meeting, options), options)
    found.equal(alone[name], tolerance(meeting))
    assert len({token for tokens in found.tokens.values() for token in tokens}) > 50
    assert found.prompts


@pytest.mark.parametrize(
    ("meeting", "pipelined"), [((3, 1), "on"), ((2, 2), "off")], indirect=["meeting"]
)
def test_chunks_preemption_and_overlap_change_nothing(
    meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers], pipelined: str
) -> None:
    name = "tied"
    options = settings(folders[name], async_scheduling=pipelined, **CRAMPED)
    found = answers(Together(*meeting, options), options)
    found.equal(alone[name], EXACT)  # chunks of prompts are other products
    assert found.preemptions > 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("wide"), shape=WIDE)


@pytest.mark.parametrize("meeting", [(2, 1)], indirect=True)
@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_sixteen_and_eight_bits_are_those_of_one_rank(
    meeting: Meeting, wide: Path, precision: dict[str, Any]
) -> None:
    if "int8" in precision.values() and not LIBRARY:
        pytest.skip("there was no C compiler")
    precision = precision | {"block_size": 32}
    options = settings(wide, **precision)
    runner = Together(*meeting, options)
    if LIBRARY:
        assert set(runner.ask(names)) == {("native", "native")}
    assert torch.equal(scores(runner, options), exactly(wide, **precision))


@pytest.mark.parametrize("meeting", [(2, 1)], indirect=True)
def test_weights_in_four_bits_are_those_of_their_stage(meeting: Meeting, tmp_path: Path) -> None:
    options = settings(test_awq.made(tmp_path, test_awq.INTERNLM))
    alone = answers(ModelRunner(options), options)
    answers(Together(*meeting, options), options).equal(alone, 0.0)


def graphs(runner: ModelRunner) -> tuple[bool, bool]:
    return runner._tile_graphs is not None, runner._graphs is not None


@pytest.mark.parametrize("meeting", [(2, 1)], indirect=True)
def test_passes_of_the_encoder_alone_are_replayed(
    workers: Workers, meeting: Meeting, folders: dict[str, Path], alone: dict[str, Answers]
) -> None:
    options = settings(folders["Qwen2"], async_scheduling="on")
    try:
        workers.do(replay, 2)
        replay()
        runner = Together(*meeting, options)
        assert runner.ask(graphs) == [(True, False), (False, False)]
        found = answers(runner, options)
    finally:
        workers.do(compute, 2)
        compute()
    found.equal(alone["Qwen2"], EXACT)  # tiles that are encoded with others


def blocks(runner: ModelRunner) -> tuple[int, int]:
    """Of the cache, as told and as they are."""
    return runner.ready().blocks_total, len(runner._kv.layers[0])


def take_memory() -> None:
    memory.free_memory = lambda: 320 << 20  # for both


def give_memory() -> None:
    memory.free_memory = FREE_MEMORY


FREE_MEMORY = memory.free_memory


@pytest.mark.parametrize("meeting", [(2, 1)], indirect=True)
@pytest.mark.parametrize("poor", ["first", "last"])
def test_the_cache_is_as_large_as_the_poorest_stage_can_have_it(
    workers: Workers, meeting: Meeting, wide: Path, poor: str
) -> None:
    small = {"request_tile_bytes": 1, "encoder_cache_bytes": 1, "cpu_memory_utilization": 0.95}
    options = settings(wide, num_kv_blocks=0, **small)
    try:
        if poor == "first":
            take_memory()
        else:
            workers.do(take_memory, 2)
        found = Together(*meeting, options).ask(blocks)
    finally:
        workers.do(give_memory, 2)
        give_memory()
    (told, held), (others_told, others_held) = found
    assert told == held == others_told == others_held
    assert 1 < told < options.max_num_seqs * (WIDE.positions // options.block_size)


def held(runner: ModelRunner) -> tuple[list[str], int]:
    """The parts of the model that are here, and the layers of the cache."""
    model = runner._model
    below = [name for name, _ in model.decoder.named_children()]
    return [name for name, _ in model.named_children()] + below, len(runner._kv.layers)


@pytest.mark.parametrize("meeting", GROUPS[:2], indirect=True)
def test_each_stage_holds_its_layers(meeting: Meeting, folders: dict[str, Path]) -> None:
    options = settings(folders["Qwen2"])
    one = ModelRunner(options)
    ranks = Together(*meeting, options)
    first, *others = ranks.ask(held)
    assert first[0] == held(one)[0]
    assert all(parts == ["decoder", "layers"] for parts, _ in others)
    layers = [count for _, count in (first, *others)]
    assert sum(layers) == LAYERS
    assert layers[0] < min(layers[1:])  # beside the encoder
    decoder, _, cache = parameters(one)
    assert sum(counts[0] for counts in ranks.ask(parameters)) == decoder
    assert [counts[2] for counts in ranks.ask(parameters)] == [
        cache // LAYERS * count for count in layers
    ]
    # Says so of the whole model.
    assert ranks.ready() == one.ready()


class Place(Group):
    """A rank of a group that never meets: enough to load what it needs."""

    def __init__(self, stage: int, stages: int, rank: int = 0, size: int = 1) -> None:
        self.stage, self.stages, self.rank, self.size = stage, stages, rank, size


def load(folder: Path, place: Place) -> InternVL:
    config = load_config(folder)
    return build_model(config, folder, device=CPU, dtype=torch.float32, group=place)


@pytest.mark.parametrize("name", SHAPES)
def test_each_stage_reads_its_layers(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    open_file = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda *a, **b: Watched(open_file(*a, **b)))
    counts = []
    for stage in range(3):
        Watched.read = 0
        model = load(folders[name], Place(stage, 3))
        if stage:
            assert Watched.read == 4 * sum(p.numel() for p in model.parameters())
        counts.append(Watched.read)
    assert sum(counts) == 4 * model.parameter_count


def test_all_weights_are_compared_wherever_they_are_needed(tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        key = f"model.language_model.layers.{LAYERS - 1}.mlp.down_proj.weight"
        tensors[key] = tensors[key][:, ::2].contiguous()

    folder = make_checkpoint(tmp_path, shape=QWEN2, change=halve)
    for stage in range(2):
        with pytest.raises(CheckpointError, match=r"down_proj.weight is \[64, 48\] instead"):
            load(folder, Place(stage, 2))


def test_layers_are_shared_out_evenly() -> None:
    def counts(rest: int, sizes: list[int], stages: int) -> list[int]:
        found = share_out(rest, sizes, stages)
        assert list(itertools.chain(*found)) == list(range(len(sizes)))
        return [len(layers) for layers in found]

    assert counts(0, [1] * 9, 3) == [3, 3, 3]
    assert counts(2, [1] * 10, 3) == [2, 4, 4]
    assert counts(20, [10] * 8, 2) == [3, 5]
    assert counts(100, [1] * 6, 3) == [1, 2, 3]  # never none
    assert counts(0, [5, 1, 1, 1, 1, 1], 2) == [1, 5]
    assert counts(7, [1] * 4, 4) == [1, 1, 1, 1]


# Worked out by hand: what is not a layer weighs as much as 6.08 layers of the 8B, 14.7 of the 38B,
# 9.33 of the 78B and 38.8 of the 1B.
BY_HAND = {
    ("1B", 2): [1, 23],
    ("8B", 2): [11, 17],
    ("8B", 4): [2, 8, 9, 9],
    ("38B", 2): [25, 39],
    ("78B", 2): [35, 45],
    ("78B", 4): [13, 22, 22, 23],
    ("78B", 8): [2, *6 * [11], 12],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InternVL]:
    root = tmp_path_factory.mktemp("published")
    found = {}
    for name, shape in INTERNVL3.items():
        config = load_config(make_checkpoint(root / name, shape=shape, weights=False))
        found[name] = skeleton(config, tied=False)
    return found


@pytest.mark.parametrize(("name", "stages"), BY_HAND)
def test_published_sizes_are_shared_out_as_by_hand(
    published: dict[str, InternVL], name: str, stages: int
) -> None:
    found = own_layers(published[name], stages, 2, "none")
    assert [len(layers) for layers in found] == BY_HAND[name, stages]


@pytest.mark.parametrize("name", INTERNVL3)
def test_the_fullest_stage_has_less_than_by_the_model_card(
    published: dict[str, InternVL], name: str
) -> None:
    """Which counts the encoder as half a device, whatever the model."""
    model = published[name]
    layers = len(model.decoder.layers)
    layer = sum(p.numel() for p in model.decoder.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - layers * layer
    for stages in (2, 3, 4, 8):
        each = math.ceil(layers / (stages - 0.5))
        card = max(rest + math.ceil(each / 2) * layer, min(each, layers) * layer)
        found = [len(part) for part in own_layers(model, stages, 2, "none")]
        ours = max(rest + found[0] * layer, max(found[1:]) * layer)
        assert ours <= card
        # No layer could go from the fullest stage to another: but each has one.
        sizes = [rest + found[0] * layer, *(count * layer for count in found[1:])]
        assert max(sizes) - min(sizes) <= layer or found[sizes.index(max(sizes))] == 1


def test_quantised_layers_weigh_what_they_take(published: dict[str, InternVL]) -> None:
    """Layers of a quarter of the bytes: what is not a layer weighs as much as 24 of the 8B."""
    found = own_layers(published["8B"], 2, 2, "bnb-4bit")
    assert [len(layers) for layers in found] == [3, 25]


def test_the_refusal_has_the_numbers(folders: dict[str, Path]) -> None:
    expected = "pipeline_parallel_size 7 is more than the model's 6 layers"
    with pytest.raises(ValueError, match=expected):
        check_stages(LAYERS, 7)
    with pytest.raises(ValueError, match=expected):
        load(folders["tied"], Place(0, 7))
