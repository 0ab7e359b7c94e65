"""Cases to tensors: prompts exactly as the server builds them, several questions per picture.

The questions about one picture share its tokens: they follow it as branches that do not see each
other, under a block mask and with positions that restart behind the pictures. To the model every
branch looks like a conversation of its own.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.cases import SHORT, images_case, pair_case, picture_case, video_case
from demo.network import TOKENS_PER_TILE
from demo.pictures import cut, labels, render
from demo.skills import Case, Turn
from demo.talk import FIXED, chat_case, tool_case
from demo.tokenizer import special_id

Rng = np.random.Generator
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You see pictures.",
)
IGNORE = -100


@dataclass
class Batch:
    """``ids, positions, segments, targets`` int64 ``[B, L]``, ``weights`` float ``[B, L]``."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor
    weights: Tensor
    tiles: Tensor | None
    truth: Tensor | None
    turns: list[tuple[int, int, str]]
    """(row, segment, skill) of every branch, for measuring."""

    def mask(self, kind: torch.dtype) -> Tensor:
        seg = self.segments
        same = (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
        causal = torch.ones(seg.shape[1], seg.shape[1], dtype=torch.bool).tril()
        allowed = same & causal & (seg[:, None, :] >= 0)
        allowed |= torch.eye(seg.shape[1], dtype=torch.bool)
        return torch.where(allowed, 0.0, -30000.0)[:, None].to(kind)


class Encoder:
    """Builds prompts; holds the tokenizer and its special ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (
            special_id(tokenizer, f"<|im_{side}|>") for side in ("start", "end")
        )
        self.img, self.img_end, self.context = (
            special_id(tokenizer, name) for name in ("<img>", "</img>", "<IMG_CONTEXT>")
        )
        self.text = functools.lru_cache(20_000)(self._text)

    def _text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)

    def head(self, role: str) -> list[int]:
        return [self.start, *self.text(role + "\n")]

    def close(self) -> list[int]:
        return [self.end, *self.text("\n")]

    def picture(self, tiles: int, label: str) -> list[int]:
        context = [self.context] * (tiles * TOKENS_PER_TILE)
        return [*self.text(label), self.img, *context, self.img_end, *self.text("\n")]

    def pack(
        self, rng: Rng, case: Case, tile_counts: list[int]
    ) -> tuple[list[int], list[tuple[list[int], list[int], str]]]:
        """(shared ids, branches); a branch is (ids, flags that mark the answer, skill)."""
        prefix: list[int] = []
        system = case.system
        if system is None and rng.random() < 0.4:
            system = SYSTEMS[int(rng.integers(len(SYSTEMS)))]
        if system is not None:
            prefix += [*self.head("system"), *self.text(system), *self.close()]
        if case.scenes and rng.random() < 0.06:
            _, questions, answer = FIXED[int(rng.integers(len(FIXED)))]
            hello = questions[int(rng.integers(len(questions)))].format(n=1)
            prefix += [*self.head("user"), *self.text(hello), *self.close()]
            prefix += [*self.head("assistant"), *self.text(answer), *self.close()]
        prefix += self.head("user")
        numbered = len(tile_counts) > 1 and rng.random() < 0.5
        pictures: list[int] = []
        for k, count in enumerate(tile_counts):
            label = f"Frame{k + 1}: " if case.video else f"Image-{k + 1}: " if numbered else ""
            pictures += self.picture(count, label)
        first = case.turns[0].question
        text_first = bool(tile_counts) and not case.video and rng.random() < 0.1
        if text_first:
            prefix += [*self.text(first), *pictures]
            return prefix, [self.branch([Turn(case.turns[0].skill, "", case.turns[0].answer)])]
        prefix += pictures
        branches, turns = [], list(case.turns)
        while turns:
            take = 2 if len(turns) > 1 and rng.random() < 0.12 else 1
            branches.append(self.branch(turns[:take]))
            del turns[:take]
        return prefix, branches

    def branch(self, turns: list[Turn]) -> tuple[list[int], list[int], str]:
        ids: list[int] = []
        flags: list[int] = []
        turns = [turn for first in turns for turn in (first, first.reply) if turn is not None]
        for index, turn in enumerate(turns):
            asked = self.head("user") if index else []
            asked = [*asked, *self.text(turn.question), *self.close(), *self.head("assistant")]
            answer = [*self.text(turn.answer), self.end]
            tail = list(self.text("\n")) if index + 1 < len(turns) else []
            ids += [*asked, *answer, *tail]
            flags += [0] * len(asked) + [1] * len(answer) + [0] * len(tail)
        return ids, flags, turns[-1].skill


def collate(encoder: Encoder, rng: Rng, cases: list[Case], most: int) -> Batch:
    """Render, tile, encode and pad; ``most`` is the tile limit per picture."""
    tiles, truth, rows = [], [], []
    for case in cases:
        counts = []
        for scene in case.scenes:
            array, columns, lines = cut(render(scene, rng), 1 if case.video else most)
            tiles.append(array)
            truth.append(labels(scene, columns, lines))
            counts.append(len(array))
        rows.append(encoder.pack(rng, case, counts))
    length = max(len(p) + sum(len(b[0]) for b in bs) for p, bs in rows)
    length = -(-length // 32) * 32  # few distinct shapes: the CPU kernels are compiled per shape
    shape = (len(rows), length)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, targets = np.full(shape, -1, np.int64), np.full(shape, IGNORE, np.int64)
    weights = np.zeros(shape, np.float32)
    turns = []
    for row, (prefix, branches) in enumerate(rows):
        n = len(prefix)
        ids[row, :n], positions[row, :n], segments[row, :n] = prefix, np.arange(n), 0
        at = n
        for number, (branch, flags, skill) in enumerate(branches, 1):
            m = len(branch)
            ids[row, at : at + m] = branch
            positions[row, at : at + m] = np.arange(n, n + m)
            segments[row, at : at + m] = number
            marks = np.flatnonzero(np.asarray(flags))
            targets[row, at + marks - 1] = np.asarray(branch)[marks]
            weights[row, at + marks - 1] = len(marks) ** -0.5
            turns.append((row, number, skill))
            at += m
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(segments),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        torch.from_numpy(np.concatenate(tiles)) if tiles else None,
        torch.from_numpy(np.concatenate(truth)) if truth else None,
        turns,
    )


SIZES = {
    "single": (20, 4),
    "pairs": (22, 6),
    "images": (9, 4),
    "video": (6, 3),
    "tiled": (5, 4),
    "chat": (10, 6),
    "tools": (8, 3),
}
"""Cases per batch and questions per case."""


def make_batch(encoder: Encoder, rng: Rng, kind: str, hard: float, scale: float = 1.0) -> Batch:
    """One batch of a kind; the difficult skills come as ``hard`` goes from 0 to 1, see cases."""
    cases, branches = SIZES[kind]
    if hard <= SHORT and kind in ("single", "images"):
        cases, branches = round(cases * 1.3), branches + 2
    cases = max(1, round(cases * scale))
    most = 1
    if kind == "single":
        made = [picture_case(rng, rng.random() < 0.15, hard, branches) for _ in range(cases)]
    elif kind == "tiled":
        made = [picture_case(rng, True, hard, branches) for _ in range(cases)]
        most = 12 if rng.random() < 0.7 else int(rng.choice([2, 4, 6]))
    elif kind == "pairs":
        made = [pair_case(rng, branches, hard) for _ in range(cases)]
    elif kind == "images":
        made = [images_case(rng, branches, hard) for _ in range(cases)]
        most = 1 if hard <= SHORT or rng.random() < 0.7 else int(rng.choice([2, 4, 12]))
    elif kind == "video":
        made = [video_case(rng, branches) for _ in range(cases)]
    elif kind == "chat":
        made = [chat_case(rng, branches) for _ in range(cases)]
    else:
        made = [tool_case(rng, branches, hard) for _ in range(cases)]
    return collate(encoder, rng, [c for c in made if c.turns], most)
