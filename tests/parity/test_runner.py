"""Tokens that the ModelRunner generates: equal to transformers', and the same however they are
planned: alone or in a batch, whole or in chunks, preempted or not."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.sampling.base import SampleRow
from engine.sampling.sampler import sample
from tests.checkpoints import SIX_B_LIKE, Shape, Tensors, make_checkpoint
from tests.parity.direct import load, prompt, run
from tests.parity.driver import GREEDY, Driver
from tests.parity.reference import Reference
from wire.sampling import SamplingParams

STEPS = 64
SHAPE = Shape()
WARM = SamplingParams(temperature=1.0, top_p=0.95, top_k=40, min_p=0.01, seed=7)

Case = tuple[list[int], list[Tensor]]


def case(shape: Shape, tiles: list[int], seed: int = 0) -> Case:
    """A prompt and its pictures' tiles."""
    ids, pixels = prompt(shape, tiles, seed)
    return ids, [] if pixels is None else list(pixels.split(tiles))


CASES: dict[str, Case] = {
    "text": case(SHAPE, [], 1),
    "picture": case(SHAPE, [1], 2),
    "tiles": case(SHAPE, [7], 3),
    "pictures": case(SHAPE, [1, 4, 2], 4),
    "more": case(SHAPE, [2, 2], 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """Each case's greedy tokens, generated alone and unchunked."""
    driver = Driver(folder)
    outputs = {}
    for name, (ids, pictures) in CASES.items():
        driver.add(name, ids, pictures)
        (outputs[name],) = driver.generate(STEPS, name)
        driver.remove(name)
    return outputs


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        SIX_B_LIKE,
        dataclasses.replace(SHAPE, tied=True),
        dataclasses.replace(SHAPE, kv_heads=4),
        dataclasses.replace(SHAPE, size=56, heads=14, kv_heads=2, head_dim=8, text_bias=False),
    ],
    ids=["300M-like", "6B-like", "tied", "one to one", "seven to one"],
)
def test_greedy_tokens_equal_the_reference(shape: Shape, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shape=shape)
    reference, driver = Reference(folder), Driver(folder)
    for name, tiles in (("text", []), ("picture", [1]), ("pictures", [1, 3])):
        ids, pictures = case(shape, tiles)
        driver.add(name, ids, pictures)
        expected = reference.greedy(ids, torch.cat(pictures) if pictures else None, STEPS)
        assert len(set(expected)) > STEPS // 4  # text that repeats itself would prove little
        assert driver.generate(STEPS, name) == [expected]


@pytest.mark.parametrize(("block_size", "chunk"), [(1, 6), (4, 5), (16, 3), (32, 17), (64, 1)])
def test_chunked_equals_whole(
    folder: Path, alone: dict[str, list[int]], block_size: int, chunk: int
) -> None:
    driver = Driver(folder, block_size=block_size, num_kv_blocks=2048 // block_size)
    for name, (ids, pictures) in CASES.items():
        driver.add(name, ids, pictures)
        assert driver.generate(STEPS, name, chunk=chunk) == [alone[name]], name


def test_a_step_says_what_each_picture_took_of_the_encoder(folder: Path) -> None:
    driver = Driver(folder)
    ids, pictures = CASES["pictures"]
    driver.add("a", ids, pictures)
    driver.step({"a": len(ids)})
    one, four, two = driver.result.encode_seconds
    assert one > 0
    assert (four, two) == pytest.approx((4 * one, 2 * one))
    driver.step({"a": 1})
    assert driver.result.encode_seconds == []


def test_a_batch_whose_rows_come_and_go_equals_each_alone(
    folder: Path, alone: dict[str, list[int]]
) -> None:
    """Rows join one by one, so that prefills of others run beside their decoding."""
    driver = Driver(folder, block_size=8, max_num_seqs=len(CASES))
    for name, (ids, pictures) in CASES.items():
        driver.add(name, ids, pictures)
        for _ in range(3):
            driver.step(dict.fromkeys(driver.sequences, 11))
    outputs = dict(zip(CASES, driver.generate(STEPS, *CASES, chunk=9), strict=True))
    assert outputs == alone


def test_a_preempted_row_goes_on_as_if_nothing_had_happened(
    folder: Path, alone: dict[str, list[int]]
) -> None:
    driver = Driver(folder, block_size=4)
    for name, (ids, pictures) in CASES.items():
        driver.add(name, ids, pictures)
    driver.generate(20)
    driver.preempt("pictures")
    driver.preempt("text")
    driver.generate(40, "tiles", "more")  # other rows overwrite the blocks meanwhile
    outputs = dict(zip(CASES, driver.generate(STEPS, chunk=13), strict=True))
    assert outputs == alone


def test_a_preempted_row_still_has_its_tiles(folder: Path, alone: dict[str, list[int]]) -> None:
    driver = Driver(folder)
    driver.add("pictures", *CASES["pictures"])
    driver.generate(5)
    for span in driver.sequences["pictures"].spans:
        driver.drop(span.digest)
    driver.preempt("pictures")
    assert driver.generate(STEPS) == [alone["pictures"]]
    assert driver.encodings == 6


def test_draws_depend_on_the_seed_and_the_position_alone(folder: Path) -> None:
    single = Driver(folder)
    for name, (ids, pictures) in CASES.items():
        single.add(name, ids, pictures, WARM)
    expected = {name: single.generate(STEPS, name)[0] for name in CASES}
    batch = Driver(folder, block_size=8)
    for name, (ids, pictures) in CASES.items():
        batch.add(name, ids, pictures, WARM)
        batch.step(dict.fromkeys(batch.sequences, 7))
    batch.add("greedy", *CASES["text"], GREEDY)
    batch.add("other", *CASES["text"], msgspec.structs.replace(WARM, seed=8))
    batch.generate(30, chunk=21)
    batch.preempt("picture")
    batch.generate(STEPS)
    assert {name: batch.sequences[name].output for name in CASES} == expected
    assert batch.sequences["other"].output != expected["text"]
    assert batch.sequences["greedy"].output != expected["text"]


def test_draws_are_counted_from_the_end_of_the_prompt(folder: Path) -> None:
    ids, pictures = CASES["picture"]
    model, driver = load(folder), Driver(folder)
    params = [msgspec.structs.replace(WARM, seed=seed) for seed in range(5)]
    for sampling in params:
        driver.add(str(sampling.seed), ids, pictures, sampling)
    drawn = [output[:2] for output in driver.generate(2)]
    for sampling, (first, second) in zip(params, drawn, strict=True):
        for position, known in ((0, []), (1, [first])):
            logits = run(model, ids + known, torch.cat(pictures))[-1:]
            row = SampleRow(sampling, np.array(ids), np.array(known, np.int64))
            assert sample(logits, [row]).tolist() == [(first, second)[position]]


def test_a_shared_picture_is_encoded_once(folder: Path, alone: dict[str, list[int]]) -> None:
    driver = Driver(folder)
    driver.add("a", *CASES["picture"], digests=[b"same"])
    driver.add("b", *CASES["picture"], digests=[b"same"])
    driver.step({"a": 100})
    driver.remove("a")
    driver.step({"b": 100})
    assert driver.generate(STEPS) == [alone["picture"]]
    assert driver.encodings == 1


@pytest.mark.parametrize("chunk", [1, 3])
def test_tiles_may_be_encoded_few_at_a_time(
    folder: Path, alone: dict[str, list[int]], chunk: int
) -> None:
    driver = Driver(folder, encoder_chunk_tiles=chunk)
    passes: list[int] = []
    model = driver.runner._model
    encode = model.encode_tiles
    model.encode_tiles = lambda tiles: (passes.append(len(tiles)), encode(tiles))[1]
    names = [name for name in CASES if CASES[name][1]]
    for name in names:
        driver.add(name, *CASES[name])
    assert driver.generate(STEPS) == [alone[name] for name in names]
    assert max(passes) == chunk


def test_tiles_are_kept_once_until_nobody_shows_them(folder: Path) -> None:
    driver = Driver(folder)
    kept = driver.runner._vision._tiles
    driver.add("a", *CASES["picture"], digests=[b"same"])
    driver.add("b", *CASES["picture"], digests=[b"same"])
    assert list(kept) == [b"same"]
    driver.runner._vision.forget("a")
    assert list(kept) == [b"same"]
    driver.runner._vision.forget("b")
    driver.runner._vision.forget("b")
    assert not kept


def test_rows_that_end_make_room_for_others(folder: Path, alone: dict[str, list[int]]) -> None:
    driver = Driver(folder, max_num_seqs=2)
    for index in range(5):
        driver.add(f"x{index}", *CASES["text"])
        driver.add(f"y{index}", *CASES["picture"])
        assert driver.generate(4) == [alone["text"][:4], alone["picture"][:4]]
        driver.remove(f"x{index}")
        driver.remove(f"y{index}")
    driver.add("never sent", *CASES["text"])
    driver.remove("never sent")
    driver.add("last", *CASES["text"])
    assert driver.generate(4) == [alone["text"][:4]]


POISON = 255


def _poison(tensors: Tensors) -> None:
    """The row of one token's embedding is not a number."""
    tensors["model.language_model.embed_tokens.weight"][POISON] = torch.nan


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, shape=SHAPE, change=_poison)


def _clean(ids: list[int]) -> list[int]:
    return [0 if token == POISON else token for token in ids]


def test_a_row_that_is_not_a_number_ends_alone(poisoned: Path) -> None:
    healthy = _clean(CASES["text"][0])
    driver = Driver(poisoned)
    driver.add("short", healthy)
    driver.add("long", healthy * 2, [], WARM)
    expected = [driver.generate(8, name)[0] for name in ("short", "long")]
    driver = Driver(poisoned, block_size=4)
    driver.free.sort(reverse=True)  # the sick row gets block 0, which shorter rows might read
    driver.add("sick", [*healthy, POISON, *healthy[:3]])
    driver.add("short", healthy)
    driver.add("long", healthy * 2, [], WARM)
    driver.step(dict.fromkeys(driver.sequences, 100))
    error = driver.sequences["sick"].error
    assert error is not None
    assert not any(word in error for word in ("Error", "nan", "/"))
    assert driver.generate(8, "short", "long") == expected


def test_blocks_of_a_sick_row_do_not_infect_their_next_owner(poisoned: Path) -> None:
    healthy = _clean(CASES["text"][0])
    driver = Driver(poisoned, block_size=16, num_kv_blocks=4)
    driver.add("healthy", healthy)
    (expected,) = driver.generate(8)
    driver.remove("healthy")
    for _ in range(3):
        driver.add("sick", [POISON] * 60)
        driver.step({"sick": 100})
        assert driver.sequences["sick"].error is not None
        driver.remove("sick")
        driver.add("a", healthy)
        driver.add("b", healthy[:6])  # shorter, so that it is padded to the length of a
        outputs = driver.generate(7, "a", "b")
        assert [len(output) for output in outputs] == [7, 7]
        assert outputs[0] == expected[:7]
        driver.remove("a")
        driver.remove("b")


def test_half_precision_runs_the_same_plans(folder: Path) -> None:
    driver = Driver(folder, dtype="bfloat16", block_size=8)
    for name, (ids, pictures) in CASES.items():
        driver.add(name, ids, pictures)
    assert all(len(output) == 12 for output in driver.generate(12, chunk=19))
    ready = driver.runner.ready()
    assert ready.dtype == "bfloat16"
    assert ready.vision_token_bytes == 2 * SHAPE.size
