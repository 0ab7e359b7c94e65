"""The demo model's training: its data is true, its runs repeat, its exports agree."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import model
from demo import CHECKPOINT, CHECKPOINT_CHAT
from demo.batches import IGNORE, SIZES, Encoder, make_batch
from demo.build import to_chat
from demo.network import TOKENS_PER_TILE, DemoNet
from demo.pictures import HEADS, NAMES, SHAPES, TILE, Scene, cut, labels, place, render
from demo.skills import count_turn, exist_turn, region
from demo.tokenizer import SPECIAL, VOCAB
from tests.servers import ROOT


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.mark.parametrize("kind", SIZES)
def test_a_seed_decides_every_token_and_pixel(tokenizer: Tokenizer, kind: str) -> None:
    encoder = Encoder(tokenizer)
    first, again, other = (
        make_batch(encoder, np.random.default_rng(seed), kind, 1.0) for seed in (3, 3, 4)
    )
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets, again.targets)
    if first.tiles is not None and again.tiles is not None:
        assert torch.equal(first.tiles, again.tiles)
    assert not (first.ids.shape == other.ids.shape and torch.equal(first.ids, other.ids))


@pytest.mark.parametrize("kind", SIZES)
def test_every_picture_token_has_its_features_and_answers_are_asked_for(
    tokenizer: Tokenizer, kind: str
) -> None:
    encoder = Encoder(tokenizer)
    batch = make_batch(encoder, np.random.default_rng(5), kind, 1.0)
    tiles = 0 if batch.tiles is None else len(batch.tiles)
    assert int((batch.ids == encoder.context).sum()) == tiles * TOKENS_PER_TILE
    for row, segment, _ in batch.turns:
        targets = batch.targets[row][batch.segments[row] == segment]
        assert targets[targets != IGNORE].tolist()[-1] == encoder.end


def test_a_branch_sees_the_pictures_and_itself_only(tokenizer: Tokenizer) -> None:
    batch = make_batch(Encoder(tokenizer), np.random.default_rng(6), "single", 1.0)
    allowed = batch.mask(torch.float32)[0, 0] == 0
    segments = batch.segments[0]
    for query in range(len(segments)):
        for key in np.flatnonzero(allowed[query]):
            assert key <= query
            assert key == query or segments[key] in (0, segments[query])


def test_labels_tell_what_is_drawn() -> None:
    """Every labelled patch inside a large shape has about that shape's colour in its middle."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        scene = Scene(TILE, TILE, (255, 255, 255))
        place(rng, scene, 1)
        (thing,) = scene.things
        truth = labels(scene, 1, 1)[0]
        tiles, _, _ = cut(render(scene, rng), 1)
        names = list(HEADS)
        marked = truth[:, names.index("shape")] > 0
        assert set(truth[marked, names.index("shape")]) == {SHAPES.index(thing.shape) + 1}
        assert set(truth[marked, names.index("colour")]) == {NAMES.index(thing.colour) + 1}
        x, y = int(thing.x), int(thing.y)
        assert np.abs(tiles[0, :, y, x].astype(int) - thing.rgb).max() < 90


def test_questions_are_balanced_and_true() -> None:
    rng = np.random.default_rng(2)
    yes = total = 0
    for _ in range(400):
        scene = Scene(150, 150, (255, 255, 255))
        place(rng, scene, 3)
        turn = exist_turn(rng, scene)
        yes, total = yes + (turn.answer == "Yes."), total + 1
        words = turn.question.rstrip("?").split()
        asked = {word for word in words if word in (*SHAPES, *NAMES)}
        matches = [t for t in scene.things if asked <= {t.shape, t.colour}]
        assert bool(matches) == (turn.answer == "Yes.")
        count = count_turn(rng, scene, 0)
        assert str(len(scene.things)) in count.answer
        for thing in scene.things:
            where = region(scene, thing)
            if where == "on the left":
                assert thing.x < scene.width / 3
    assert 0.4 < yes / total < 0.6


def test_the_tokenizer_is_lossless_and_complete(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB
    for text in ("Hello, Wörld! 你好 😀\n\tx  y", "书生·万象", "\u0000\u2028 \r\n", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for name in SPECIAL:
        assert tokenizer.encode(name).ids == [tokenizer.token_to_id(name)]


def test_both_formats_hold_the_same_numbers() -> None:
    native = load_file(CHECKPOINT / "model.safetensors")
    original = load_file(CHECKPOINT_CHAT / "model.safetensors")
    converted = to_chat(native)
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    for folder in (CHECKPOINT, CHECKPOINT_CHAT):
        assert (folder / "model.safetensors").stat().st_size <= 12 << 20


@pytest.mark.parametrize("folder", [CHECKPOINT, CHECKPOINT_CHAT], ids=lambda path: path.name)
def test_the_served_model_computes_what_was_trained(folder: Path, tokenizer: Tokenizer) -> None:
    """Picture features of the serving implementation against the training network, float32."""
    net = DemoNet()
    weights = {n: t.float() for n, t in load_file(CHECKPOINT / "model.safetensors").items()}
    missing = net.load_state_dict(weights, strict=False)
    assert all(name.startswith("heads.") for name in missing.missing_keys)
    assert not missing.unexpected_keys
    served = model.build_model(
        model.load_config(folder),
        folder,
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=lambda done, total: None,
    )
    scene = Scene(TILE, TILE, (255, 255, 255))
    rng = np.random.default_rng(7)
    place(rng, scene, 3)
    tiles = torch.from_numpy(cut(render(scene, rng), 12)[0])
    with torch.inference_mode():
        ours = served.encode_tiles(tiles)
        trained = net.model.multi_modal_projector(net.model.vision_tower(tiles))
    # Both are float32; the sums run in different orders.
    torch.testing.assert_close(ours.reshape(trained.shape), trained, atol=2e-4, rtol=2e-4)


def start(work: Path) -> subprocess.Popen[bytes]:
    flags = [
        "--workers",
        "1",
        "--scale",
        "0.1",
        "--look-steps",
        "6",
        "--bind-steps",
        "2",
        "--talk-steps",
        "2",
    ]
    command = [sys.executable, "-m", "demo.train", "--work", str(work), "--save-every", "1"]
    return subprocess.Popen([*command, *flags], cwd=ROOT)


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait() == 0
    run = start(parts)
    state = parts / "state.safetensors"
    while not state.exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL  # before it was done
    assert start(parts).wait() == 0
    one, other = (load_file(folder / "state.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
