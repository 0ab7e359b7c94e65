"""What the runner keeps of each sequence: tokens and block tables, in arrays shared by all rows.

A step's flat batch is put together by array operations over these tables; nothing here costs
time in proportion to a sequence's length except adding it. Rows come and go as plans say.
"""

import dataclasses
import itertools
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.grammar import Matcher
from engine.plan import NewRow, VisionSpan, Work
from engine.sampling import is_plain
from engine.sampling.base import SampleRow
from model.attention.base import AttentionBatch
from model.transfer import to_device
from wire.positions import saved
from wire.sampling import SamplingParams

_NOTHING = np.zeros((3, 0), dtype=np.int64)


@dataclasses.dataclass
class Row:
    """One sequence. ``index`` is its line in the tables; ``vision_end`` ends its last picture.

    ``turns`` are the positions of the tokens before that, fp32, where they are not the tokens'
    numbers; behind it positions are ``saved`` less than those. Behind its ``length`` tokens stand
    as many as are ``speculated``.
    """

    index: int
    prompt_len: int
    sampling: SamplingParams
    spans: list[VisionSpan]
    vision_end: int
    length: int
    matcher: Matcher | None
    is_plain: bool
    is_greedy: bool
    turns: np.ndarray | None
    saved: int
    blocks: int = 0
    speculated: int = 0

    def positions(self, start: int, count: int) -> np.ndarray:
        """Of ``count`` tokens from ``start`` on, fp32."""
        found = np.arange(start, start + count, dtype=np.float32) - self.saved
        if self.turns is not None and start < self.vision_end:
            before = self.turns[start : start + count]
            found[: len(before)] = before
        return found


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The flat batch of one step: N tokens; ``starts[i]`` is where work i begins in it.

    The ids at ``unknown[0]`` are still being drawn, for the lines ``unknown[1]`` of the tables.
    """

    ids: Tensor  # [N] int64
    unknown: Tensor | None  # [2, U] int64
    positions: Tensor  # [N] int64, or fp32 where some are fractions
    attention: AttentionBatch
    starts: list[int]


class DeviceRows:
    """What graphs look up by a row's line: its block table, and the token drawn last for it.

    The line ``padding`` belongs to no row. Entries that a row does not own may name any block.
    """

    def __init__(self, *, capacity: int, max_blocks: int, device: torch.device) -> None:
        self.padding = capacity
        self.tables = torch.zeros(capacity + 1, max_blocks, dtype=torch.long, device=device)
        self.last = torch.zeros(capacity + 1, dtype=torch.long, device=device)
        self._host = self.last.numpy() if device.type == "cpu" else None

    def note(self, lines: Sequence[int], tokens: Tensor) -> None:
        """Keep the tokens drawn last for lines, where the next step finds them."""
        if self._host is None:
            self.last[to_device(lines, self.last.device)] = tokens.clamp(min=0)
            return
        for line, token in zip(lines, tokens.tolist(), strict=True):
            self._host[line] = max(token, 0)

    def update(self, entries: np.ndarray) -> None:
        """Set entries of the tables: [3, n] lines, places and blocks, no place twice."""
        if entries.size:
            lines, places, blocks = to_device(entries, self.tables.device)
            self.tables[lines, places] = blocks


class Rows:
    """The tables of at most ``capacity`` rows of at most ``max_len`` tokens."""

    def __init__(
        self, *, capacity: int, max_len: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        # Untouched lines of a zeroed array take no memory.
        self._tokens = np.zeros((capacity, max_len), dtype=np.int64)
        self._tables = np.zeros((capacity, -(-max_len // block_size)), dtype=np.int64)
        self._owned = np.zeros(capacity, dtype=np.int64)
        self._free = list(range(capacity - 1, -1, -1))
        self._rows: dict[str, Row] = {}
        self._appended: list[tuple[int, int, Sequence[int]]] = []

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def add(self, new: NewRow, matcher: Matcher | None = None) -> None:
        """Take a sequence in, whole; ``matcher`` is at the beginning of its grammar."""
        index = self._free.pop()
        length = len(new.token_ids)
        self._tokens[index, :length] = new.token_ids
        self._owned[index] = 0
        end = max((span.offset + span.length for span in new.spans), default=0)
        turns, less = _turns(new.spans)
        self._rows[new.id] = Row(
            index,
            new.prompt_len,
            new.sampling,
            new.spans,
            end,
            length,
            matcher,
            plain := is_plain(new.sampling, matcher),
            plain and new.sampling.greedy,
            turns,
            less,
        )
        self.append_blocks(new.id, new.blocks)

    def remove(self, name: str) -> None:
        """Forget a sequence; unknown names are ignored."""
        row = self._rows.pop(name, None)
        if row is not None:
            self._free.append(row.index)

    def append_blocks(self, name: str, blocks: Sequence[int]) -> None:
        """Lengthen a row's block table."""
        row = self._rows[name]
        self._tables[row.index, row.blocks : row.blocks + len(blocks)] = blocks
        self._appended.append((row.index, row.blocks, blocks))
        row.blocks += len(blocks)
        self._owned[row.index] = row.blocks

    def appended(self) -> np.ndarray:
        """What ``append_blocks`` has done since the last call, for ``DeviceRows.update``."""
        if not self._appended:
            return _NOTHING
        found, self._appended = self._appended, []
        # A line that changed its owner since then has its last one's blocks.
        entries = {
            (line, place + i): block
            for line, place, blocks in found
            for i, block in enumerate(blocks)
        }
        return np.array([(*at, block) for at, block in entries.items()], dtype=np.int64).T

    def speculate(self, name: str, tokens: Sequence[int]) -> None:
        """Put tokens on trial behind a row's own."""
        row = self._rows[name]
        self._tokens[row.index, row.length : row.length + len(tokens)] = tokens
        row.speculated = len(tokens)

    def append_token(self, name: str, token: int) -> bool:
        """Lengthen a row by the token drawn for it, and say whether that was speculated; a row that
        is gone is ignored."""
        row = self._rows.get(name)
        if row is None:
            return False
        right = row.speculated > 0 and bool(self._tokens[row.index, row.length] == token)
        # The last token of a sequence of full length is never computed, nor kept.
        if row.length < self._tokens.shape[1]:
            self._tokens[row.index, row.length] = token
        row.length += 1
        row.speculated = row.speculated - 1 if right else 0
        return right

    def sample_rows(self, names: Sequence[str]) -> list[SampleRow]:
        """What the sampler must know of rows to draw for. One that is named several times in
        succession draws behind each of the tokens on trial too."""
        found, again = [], 0
        for name, before in zip(names, ["", *names], strict=False):
            again = again + 1 if name == before else 0
            found.append(self.sample_row(name, again))
        return found

    def sample_row(self, name: str, speculated: int = 0) -> SampleRow:
        """The same of one, behind so many tokens on trial, without copying its tokens."""
        row = self._rows[name]
        tokens = self._tokens[row.index, : row.length + speculated]
        prompt, output = tokens[: row.prompt_len], tokens[row.prompt_len :]
        return SampleRow(row.sampling, prompt, output, row.matcher)

    def matcher(self, name: str) -> Matcher | None:
        """Where a sequence stands in its grammar; None also if it is gone."""
        row = self._rows.get(name)
        return row.matcher if row is not None else None

    def are_plain(self, names: Sequence[str]) -> bool:
        """Whether ``sampler.sample_plain`` can draw for all of them."""
        return all(self._rows[name].is_plain for name in names)

    def are_greedy(self, names: Sequence[str]) -> bool:
        """Whether it needs nothing but their logits for that."""
        return all(self._rows[name].is_greedy for name in names)

    def are_single(self, work: Sequence[Work]) -> bool:
        """Whether one is drawn behind each of these tokens, and none is a picture's."""
        return all(
            item.count == 1 + len(item.speculated)
            and item.sample
            and item.start >= self._rows[item.id].vision_end
            for item in work
        )

    def decode_inputs(self, work: Sequence[Work], size: int) -> "array[int]":
        """Tokens behind each of which one is drawn, int32 [4, size]: lines of the tables, ids,
        lengths, and how many positions the pictures before have saved.

        An id is -1 where the token is still being drawn. What is left is padding, of length 0.
        """
        lines, ids, lengths, saved = [], [], [], []
        for item in work:
            row = self._rows[item.id]
            for place in range(item.start, item.start + item.count):
                known = place < row.length + row.speculated
                lines.append(row.index)
                ids.append(self._tokens[row.index, place] if known else -1)
                lengths.append(place + 1)
                saved.append(row.saved)
        rest = [0] * (size - len(lines))
        padding = [len(self._tokens)] * len(rest)
        return array("i", [*lines, *padding, *ids, *rest, *lengths, *rest, *saved, *rest])

    def lines(self, names: Sequence[str]) -> list[int]:
        """Where sequences stand in the tables."""
        return [self._rows[name].index for name in names]

    def batch(self, work: Sequence[Work]) -> StepBatch:
        """The flat batch of a plan's work, whose block tables are up to date."""
        size, device = self._block_size, self._device
        # What there is one of per row is Python's: arrays pay where there is one per token.
        rows = [self._rows[item.id] for item in work]
        counts = [item.count for item in work]
        contexts = [item.start + item.count for item in work]
        bounds = [0, *itertools.accumulate(counts)]
        owners = lines = np.array([row.index for row in rows])
        positions = np.array([item.start for item in work])
        if bounds[-1] > len(rows):
            owners = lines.repeat(counts)
            positions = np.arange(bounds[-1]) + (positions - bounds[:-1]).repeat(counts)
        places, offsets = np.divmod(positions, size)
        slots = self._tables[owners, places] * size + offsets
        width = -(-max(contexts) // size)
        tables = self._tables[lines, :width]
        if any(row.blocks < width for row in rows):
            # Entries that a row does not own must not name another row's blocks.
            tables = np.where(np.arange(width) < self._owned[lines, None], tables, tables[:, :1])
        attention = AttentionBatch(
            query_starts=to_device(np.array(bounds, dtype=np.int32), device),
            context_lengths=to_device(np.array(contexts, dtype=np.int32), device),
            slots=to_device(slots, device),
            block_tables=to_device(tables, device),
            queries=tuple(counts),
            contexts=tuple(contexts),
        )
        ids = self._tokens[owners, positions]
        turns = positions
        if any(row.turns is not None for row in rows):
            turns = positions.astype(np.float32)
            for item, row, start in zip(work, rows, bounds, strict=False):
                turns[start : start + item.count] = row.positions(item.start, item.count)
        late = [
            (start, row.index)
            for item, row, start in zip(work, rows, bounds, strict=False)
            if item.start == row.length
        ]
        unknown = to_device(np.array(late).T, device) if late else None
        return StepBatch(
            to_device(ids, device), unknown, to_device(turns, device), attention, bounds[:-1]
        )


def _turns(spans: Sequence[VisionSpan]) -> tuple[np.ndarray | None, int]:
    """Positions up to the end of the last picture, fp32, and how many are saved until there; None
    where they are the tokens' numbers."""
    if all(span.step == 1 for span in spans):
        return None, 0
    turns = np.arange(spans[-1].offset + spans[-1].length, dtype=np.float32)
    less = 0
    for span in spans:
        end = span.offset + span.length
        before = span.offset - less - 1
        turns[span.offset : end] = before + span.step * np.arange(1, span.length + 1)
        less += saved(span.length, span.step)
        turns[end:] = np.arange(end, len(turns)) - less
    return turns, less
