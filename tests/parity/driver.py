"""Drives a ModelRunner with plans made by hand, in place of the scheduler."""

import dataclasses
import random
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.plan import EncodeItem, NewRow, Sampled, StepPlan, StepResult, VisionSpan, Work
from engine.runner import ModelRunner
from tests.checkpoints import IMAGE_TOKEN
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class Sequence:
    """What the driver knows of a sequence."""

    ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    spans: list[VisionSpan]
    tiles: list[int]
    computed: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    sent: bool = False
    error: str | None = None

    @property
    def output(self) -> list[int]:
        return self.ids[self.prompt_len :]


class Driver:
    """Sequences by name, and blocks dealt out in a scattered order."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        values: dict[str, Any] = {"num_kv_blocks": 256, "block_size": 16} | settings
        values = {"threads": 1, "device": "cpu", "step_budget_ms": 0} | values
        self.runner = ModelRunner(EngineSettings(model=str(folder), **values))
        self.block_size = self.runner.ready().block_size
        self.free = list(range(self.runner.ready().blocks_total))
        random.Random(0).shuffle(self.free)
        self.sequences: dict[str, Sequence] = {}
        self.encoded: set[bytes] = set()
        self.encodings = 0
        self.result: StepResult  # of the last step
        self._steps = 0
        self._removed: list[str] = []
        self._preempted: list[str] = []
        self._dropped: list[bytes] = []

    def add(
        self,
        name: str,
        ids: list[int],
        pictures: list[Tensor] | None = None,
        sampling: SamplingParams = GREEDY,
        digests: list[bytes] | None = None,
    ) -> None:
        """A prompt; its runs of picture tokens belong to ``pictures`` in order."""
        pictures = pictures or []
        per_tile = self.runner.ready().geometry.tokens_per_tile
        spans, items, at = [], [], 0
        for index, tiles in enumerate(pictures):
            at = ids.index(IMAGE_TOKEN, at)
            digest = digests[index] if digests else f"{name}/{index}".encode()
            spans.append(VisionSpan(digest, at, len(tiles) * per_tile))
            items.append(VisionItem(digest, at, len(tiles) * per_tile, len(tiles), index))
            at += len(tiles) * per_tile
        request = EngineRequest(name, ids, sampling, items)
        self.runner.upload(request, [tiles.numpy().tobytes() for tiles in pictures])
        self.sequences[name] = Sequence(
            list(ids), len(ids), sampling, spans, [len(tiles) for tiles in pictures]
        )

    def preempt(self, name: str) -> None:
        """Take a sequence's blocks away; it starts again from its first token."""
        sequence = self.sequences[name]
        self.free += sequence.blocks
        sequence.blocks, sequence.computed, sequence.sent = [], 0, False
        self._preempted.append(name)

    def remove(self, name: str) -> None:
        """End a sequence."""
        sequence = self.sequences.pop(name)
        self.free += sequence.blocks
        self._removed.append(name)

    def drop(self, digest: bytes) -> None:
        """Drop an encoder output."""
        self.encoded.remove(digest)
        self._dropped.append(digest)

    def step(self, counts: dict[str, int]) -> list[Sampled]:
        """One step: compute so many positions of each named sequence, at most what is known."""
        new_rows, work, encode = [], [], []
        for name, count in counts.items():
            sequence = self.sequences[name]
            if not sequence.sent:
                sequence.sent = True
                new_rows.append(
                    NewRow(
                        name,
                        list(sequence.ids),
                        sequence.prompt_len,
                        sequence.sampling,
                        sequence.spans,
                    )
                )
            end = min(sequence.computed + count, len(sequence.ids))
            encode += self._encode(name, sequence, end)
            fresh = []
            while len(sequence.blocks) * self.block_size < end:
                fresh.append(self.free.pop())
                sequence.blocks.append(fresh[-1])
            sample = end == len(sequence.ids)
            work.append(Work(name, sequence.computed, end - sequence.computed, fresh, sample))
            sequence.computed = end
        plan = StepPlan(
            self._steps, new_rows, work, encode, self._dropped, self._removed, self._preempted
        )
        self._removed, self._preempted, self._dropped = [], [], []
        self._steps += 1
        self.runner.begin(plan)
        self.runner.sample()
        result = self.result = self.runner.finish()
        assert result.step == plan.step
        assert [s.id for s in result.sampled] == [w.id for w in work if w.sample]
        for sampled in result.sampled:
            sequence = self.sequences[sampled.id]
            sequence.error = sampled.error
            if sampled.error is None:
                sequence.ids.append(sampled.token_id)
        return result.sampled

    def generate(self, count: int, *names: str, chunk: int = 10_000) -> list[list[int]]:
        """Step until each named sequence (or all) has ``count`` tokens of output or an error."""
        chosen = names or tuple(self.sequences)
        while True:
            todo = {
                name: chunk
                for name in chosen
                if len(self.sequences[name].output) < count and not self.sequences[name].error
            }
            if not todo:
                return [self.sequences[name].output for name in chosen]
            self.step(todo)

    def _encode(self, name: str, sequence: Sequence, end: int) -> list[EncodeItem]:
        items = []
        for index, span in enumerate(sequence.spans):
            needed = span.offset < end and span.offset + span.length > sequence.computed
            if needed and span.digest not in self.encoded:
                self.encoded.add(span.digest)
                self.encodings += 1
                items.append(EncodeItem(span.digest, name, 0, sequence.tiles[index]))
        return items
