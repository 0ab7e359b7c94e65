"""What the scheduler tells the runner, and what the runner answers. Both are frozen.

The runner keeps one row per sequence it has been told of: a sequence is sent whole once, as a
``NewRow``; later steps send only what changed. The runner never decides anything: a plan names
every token to compute, every tile to encode and every tensor to drop, in that order.

``gc=False``: hundreds of these are made per step, and none can be part of a cycle.
"""

import msgspec

from wire.messages import PromptLogprobs, TokenLogprobs
from wire.sampling import SamplingParams


class VisionSpan(msgspec.Struct, frozen=True):
    """Encoder output ``digest`` fills the prompt's tokens ``offset : offset + length``, each of
    which takes ``step`` positions (``wire.positions``)."""

    digest: bytes
    offset: int
    length: int
    step: float = 1.0


class NewRow(msgspec.Struct, frozen=True):
    """A sequence the runner does not hold: new, or back from preemption.

    ``token_ids`` are all tokens known so far (prompt and, after preemption, output);
    ``prompt_len`` of them are prompt, which keys sampling draws by output position. ``blocks``
    begin its block table: they hold the keys and values of its first tokens already.
    """

    id: str
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    spans: list[VisionSpan]
    blocks: list[int] = []


class Work(msgspec.Struct, frozen=True, gc=False):
    """Compute positions ``start : start + count`` of row ``id`` in this step.

    ``new_blocks`` are appended to the row's block table before. With ``sample`` the last
    position computed is the sequence's last token, and the next one is drawn and appended to
    the row by the runner itself. The token at ``start`` may be one that the step before draws.
    The last of these positions may hold ``speculated`` tokens, which the row does not have: behind
    each that is right, which is the one drawn in its place, one more is drawn and appended.
    With ``score`` the tokens of the prompt that follow these positions, or those of them that its
    lookup names, are looked up in their logits.
    """

    id: str
    start: int
    count: int
    new_blocks: list[int]
    sample: bool
    score: bool = False
    speculated: tuple[int, ...] = ()


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Block ``target`` becomes what block ``source`` is, which may be itself."""

    source: int
    target: int


class EncodeItem(msgspec.Struct, frozen=True):
    """Encode tiles ``start : start + tiles`` of picture ``digest``, which request ``request_id``
    shows."""

    digest: bytes
    request_id: str
    start: int
    tiles: int


class StepPlan(msgspec.Struct, frozen=True):
    """One step. Order of application: remove, drop, add, encode, copy, compute, sample.

    ``removed`` sequences never come back: their row, if there is one (a sequence may end before
    its first step), and their raw tiles go. ``preempted`` rows go too, but their raw tiles stay:
    the sequence comes back as a NewRow.

    ``copies`` are made one after the other. Each target is the first of a new row's new blocks, and
    has the keys and values of its tokens before the first that is computed. A source may be a new
    block of another row.
    """

    step: int
    new_rows: list[NewRow]
    work: list[Work]
    encode: list[EncodeItem]
    drop: list[bytes]
    removed: list[str]
    preempted: list[str] = []
    copies: list[Copy] = []

    @property
    def ids(self) -> list[str]:
        """The requests that this step computes something for."""
        names = [work.id for work in self.work] + [item.request_id for item in self.encode]
        return list(dict.fromkeys(names))


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """The token drawn for row ``id``. There is none when its parameters leave none (``stuck``), and
    when the model's output cannot be used; ``error`` says why where there is more to say."""

    id: str
    token_id: int
    error: str | None = None
    logprobs: TokenLogprobs | None = None
    stuck: bool = False


class StepResult(msgspec.Struct, frozen=True):
    """The runner's answer: one Sampled per Work with ``sample``, in the plan's order, with one more
    for each of its speculated tokens that was right; and for each with ``score`` an entry per
    position that another token of the prompt follows, or per one of these that its lookup names.
    ``encode_seconds`` has what each EncodeItem took, ``seconds`` what the step did; 0: unknown."""

    step: int
    sampled: list[Sampled]
    scored: list[list[PromptLogprobs]] = []
    encode_seconds: list[float] = []
    seconds: float = 0.0
