"""What the processes of ``internvl verify`` hand each other, as files in one folder."""

import msgspec

from wire.messages import EngineRequest, Ready

CASES, OURS, FOUND = "cases.msgpack", "ours.safetensors", "found.msgpack"
"""A ``Cases``; per case our logits and, behind ``TOKENS``, our greedy tokens; a ``Found``."""
TOKENS = "/tokens"
MOST_POSITIONS = 64


class Picture(msgspec.Struct, frozen=True):
    """``pixels`` are uint8 ``[height, width, 3]``, RGB."""

    width: int
    height: int
    pixels: bytes


class Case(msgspec.Struct, frozen=True):
    """One turn of a user: pictures, then a video of ``frames``, then ``text``; and what our
    pipeline made of it. ``grids`` are columns and rows, a picture each. A case that is not
    ``computed`` is of tiles and prompt only."""

    name: str
    text: str
    pictures: list[Picture]
    frames: list[Picture]
    computed: bool
    request: EngineRequest
    buffers: list[bytes]
    grids: list[tuple[int, int]]


class Cases(msgspec.Struct, frozen=True):
    """All cases, for an engine that said ``ready``."""

    ready: Ready
    cases: list[Case]


class Logits(msgspec.Struct, frozen=True):
    """How far our logits are from transformers' in the same precision: the largest difference, and
    that in units of the logits' ``deviation``. Where that precision is not float32, also how far
    ours and theirs are from theirs in float32: root mean squares, divergence (Kullback-Leibler,
    nats) and agreement of ours on the likeliest token."""

    largest: float
    relative: float
    deviation: float
    same_top: float
    ours_exact: float = 0.0
    theirs_exact: float = 0.0
    divergence: float = 0.0
    agreement: float = 1.0


class Outcome(msgspec.Struct, frozen=True):
    """What was found of a case; ``wrong`` says what is out of bounds. ``pixels`` is the largest
    difference of a sample, in 255ths. ``greedy`` counts equal tokens, of ``tokens``; at the first
    other one theirs is likelier than ours by ``margin``, in their logits."""

    name: str
    tiles: tuple[int, int]
    grids: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    pixels: int | None
    prompt: tuple[int, int]
    prompt_differs: int | None
    logits: Logits | None
    greedy: int
    tokens: int
    margin: float | None
    wrong: list[str]


class Found(msgspec.Struct, frozen=True):
    """All that was found, and against what."""

    outcomes: list[Outcome]
    dtype: str
    quantization: str
    notes: list[str]
    bounds: str


def positions(count: int) -> list[int]:
    """The positions of a prompt at which logits are compared: evenly spread, the last included."""
    kept = min(count, MOST_POSITIONS)
    return [(index + 1) * count // kept - 1 for index in range(kept)]
