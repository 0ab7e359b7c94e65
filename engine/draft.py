"""A plan being made, and what is left of the step's budgets. Only the Scheduler uses it."""

from collections.abc import Callable

from engine.cost import Allowance
from engine.plan import Copy, EncodeItem, NewRow, Work
from engine.sequence import Sequence


class Draft:
    """The lists of a StepPlan, growing; ``tokens`` and ``tiles`` may be added to them.

    ``gate_open``: no sequence waits for room in the vision cache, or for the encoder.
    """

    __slots__ = (
        "_allow",
        "_time",
        "copies",
        "encode",
        "gate_open",
        "new_rows",
        "preempted",
        "sequences",
        "step",
        "tiles",
        "tokens",
        "work",
    )

    def __init__(
        self, step: int, tokens: int, tiles: int, allow: Callable[["Draft"], Allowance]
    ) -> None:
        self.step = step
        self.tokens = tokens
        self.tiles = tiles
        self._allow = allow
        self._time: Allowance | None = None
        self.gate_open = True
        self.new_rows: list[NewRow] = []
        self.work: list[Work] = []
        self.sequences: list[Sequence] = []  # of each work, in its order
        self.encode: list[EncodeItem] = []
        self.preempted: list[str] = []
        self.copies: list[Copy] = []

    @property
    def time(self) -> Allowance:
        """For prompts and pictures; where all rows generate nobody asks for it."""
        if self._time is None:
            self._time = self._allow(self)
        return self._time

    def add(
        self,
        sequence: Sequence,
        count: int,
        new_blocks: list[int],
        speculated: tuple[int, ...] = (),
    ) -> None:
        """Compute the next ``count`` positions of a sequence, and draw where they end it; behind
        that one, tokens on trial."""
        start = sequence.num_planned
        sample = start + count == sequence.num_known
        score = sequence.scores is not None and sequence.scores_in(start, count)
        is_prompt = count > 1 or not sample
        count += len(speculated)
        self.work.append(Work(sequence.id, start, count, new_blocks, sample, score, speculated))
        self.sequences.append(sequence)
        sequence.num_planned += count
        sequence.num_known += sample
        sequence.last_step = self.step
        self.tokens -= count
        if is_prompt:
            self.time.take(start, count)
        if sample and self._time is not None:  # be it of a prompt whose last token alone was left
            self._time.end_prompt()

    def encode_tile(self, request_id: str, digest: bytes, tile: int) -> None:
        """Encode one tile of a picture; neighbours become one item."""
        self.tiles -= 1
        self.time.take_tile()
        start = tile
        if self.encode:
            last = self.encode[-1]
            if (last.digest, last.request_id, last.start + last.tiles) == (
                digest,
                request_id,
                tile,
            ):
                start = self.encode.pop().start
        self.encode.append(EncodeItem(digest, request_id, start, tile + 1 - start))
