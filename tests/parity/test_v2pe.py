"""Pictures whose tokens take less than a position each (V2PE): tokens equal those of transformers'
model, which is given the positions that the formula below says, however the steps are cut."""

import math
from pathlib import Path

import msgspec
import pytest
import torch

from engine.plan import NewRow, VisionSpan, Work
from engine.rows import Rows
from model import InternVL
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.reference import Reference
from tests.parity.test_graphs import replays
from tests.parity.test_scheduled import CRAMPED, requests, run
from tests.replay import Replays
from wire.messages import EngineRequest, VisionItem
from wire.positions import STEPS, all_saved
from wire.sampling import SamplingParams

__all__ = ["replays"]  # the fixture

SHAPE = Shape()
COUNT = 20


def formula(request: EngineRequest) -> list[float]:
    """Token by token, as the authors of V2PE publish it: a picture's tokens each add the step to
    the position of the token before them; what follows, a picture too, goes on from there rounded
    up."""
    inside = {item.offset + k: item.step for item in request.items for k in range(item.length)}
    starts = {item.offset for item in request.items}
    positions: list[float] = []
    last = -1.0
    for index in range(len(request.prompt)):
        if index in starts or index not in inside:
            last = math.ceil(last)
        last += inside.get(index, 1)
        positions.append(last)
    return positions


def stepped(step: float | None) -> list[tuple[EngineRequest, list[bytes]]]:
    """The requests of the other tests, greedy; None mixes the steps."""
    made = []
    for number, (request, buffers) in enumerate(requests()):
        used = STEPS[number % len(STEPS)] if step is None else step
        items = [msgspec.structs.replace(item, step=used) for item in request.items]
        sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
        made.append((msgspec.structs.replace(request, items=items, sampling=sampling), buffers))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape=SHAPE)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[int]]:
    """transformers', for mixed steps."""
    reference, found = Reference(folder), {}
    for request, buffers in stepped(None):
        tiles = torch.frombuffer(bytearray(b"".join(buffers)) or bytearray(1), dtype=torch.uint8)
        side = SHAPE.tile_size
        pixels = tiles.view(-1, 3, side, side) if buffers else None
        found[request.id] = reference.greedy(request.prompt, pixels, COUNT, formula(request))
    return found


@pytest.mark.parametrize("settings", [{}, *CRAMPED.values()], ids=["roomy", *CRAMPED])
def test_tokens_are_the_references(
    folder: Path, expected: dict[str, list[int]], settings: dict[str, int]
) -> None:
    tokens, _ = run(folder, [stepped(None)], **settings)
    assert tokens == expected


def test_positions_change_the_answer(folder: Path, expected: dict[str, list[int]]) -> None:
    plain, _ = run(folder, [stepped(1.0)])
    changed = {name for name in plain if plain[name] != expected[name]}
    shown = {r.id for r, _ in stepped(None) if any(item.step < 1 for item in r.items)}
    assert changed <= shown
    assert len(changed) > len(shown) / 2


def test_a_step_of_one_is_none_to_the_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits: list[list[torch.Tensor]] = [[], []]
    compute = InternVL.logits
    for step, found in zip((None, 1.0), logits, strict=True):

        def keep(
            model: InternVL, hidden: torch.Tensor, found: list[torch.Tensor] = found
        ) -> torch.Tensor:
            found.append(compute(model, hidden))
            return found[-1]

        monkeypatch.setattr(InternVL, "logits", keep)
        batch = stepped(1.0)
        if step is None:
            batch = [
                (msgspec.structs.replace(r, items=list(map(bare, r.items))), b) for r, b in batch
            ]
        run(folder, [batch])
    assert len(logits[0]) > COUNT
    for one, other in zip(*logits, strict=True):
        assert torch.equal(one, other)


def bare(item: VisionItem) -> VisionItem:
    return VisionItem(item.digest, item.offset, item.length, item.tiles, item.buffer)


@pytest.mark.parametrize("settings", [{"async_scheduling": "on"}, CRAMPED["few blocks"]])
def test_replayed_steps_have_the_same_positions(
    folder: Path,
    expected: dict[str, list[int]],
    replays: Replays,
    settings: dict[str, int],
) -> None:
    tokens, core = run(folder, [stepped(None)], **settings)
    assert tokens == expected
    assert replays.count > core._scheduler.stats.steps / 3


def test_a_sequence_that_begins_again_has_the_same_positions(
    folder: Path, expected: dict[str, list[int]]
) -> None:
    """As after the death of an engine: what was generated comes with the request."""
    half = COUNT // 2
    again = [
        (msgspec.structs.replace(request, output=expected[request.id][:half]), buffers)
        for request, buffers in stepped(None)
    ]
    tokens, _ = run(folder, [again])
    assert tokens == {name: row[half:] for name, row in expected.items()}


def test_prefixes_are_shared_only_with_the_same_step(
    folder: Path, expected: dict[str, list[int]]
) -> None:
    def named(prefix: str, step: float | None) -> list[tuple[EngineRequest, list[bytes]]]:
        return [
            (msgspec.structs.replace(request, id=f"{prefix}{request.id}"), buffers)
            for request, buffers in stepped(step)
        ]

    batches = [named("plain ", 1.0), named("", None), named("again ", None)]
    tokens, core = run(folder, batches, block_size=4, num_kv_blocks=2000)
    assert {name: tokens[name] for name in expected} == expected
    assert {name: tokens["again " + name] for name in expected} == expected
    # What stands before a picture is shared, whatever the step.
    assert core._scheduler.stats.cached_tokens > 0


@pytest.mark.parametrize("step", STEPS)
def test_positions_of_any_chunk_are_the_formulas(step: float) -> None:
    for request, _ in stepped(step):
        rows = Rows(capacity=1, max_len=400, block_size=16, device=torch.device("cpu"))
        spans = [VisionSpan(i.digest, i.offset, i.length, i.step) for i in request.items]
        ids = request.prompt + [1] * COUNT
        prompt_len = len(request.prompt)
        rows.add(NewRow("r", ids, prompt_len, request.sampling, spans, list(range(25))))
        whole = formula(request)
        whole += [math.ceil(whole[-1]) + 1 + k for k in range(COUNT)]
        for size in (1, 5, len(ids)):
            found = [
                position
                for start in range(0, len(ids), size)
                for position in rows.batch(
                    [Work("r", start, min(size, len(ids) - start), [], False)]
                ).positions.tolist()
            ]
            assert found == whole
        assert len(ids) - 1 - all_saved(request.items) == whole[-1]
