"""One generating sequence inside the engine.

The Scheduler owns every Sequence and is the only one to change it; a Sequence never leaves the
engine. It has no phase: ``num_computed`` positions are in the KV cache and must catch up with
``token_ids``, whether those came from the prompt or were generated.
"""

import bisect
import enum
import itertools

from engine.plan import NewRow, VisionSpan, Work
from engine.speculation import PromptLookup
from wire.messages import EngineRequest, PromptLogprobs, Times


class Refused(Exception):
    """This request cannot be computed, whatever else happens; the text may go to the client."""


class Status(enum.Enum):
    """Where a sequence is: in the waiting queue, in the batch, or gone."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Sequence:
    """Tokens, progress and holdings of one request.

    ``num_planned`` counts the positions of steps that are still under way too, ``num_known`` the
    tokens that those steps draw; without such a step they are ``num_computed`` and the length of
    ``token_ids``. ``last_step`` is the last step that works on it.
    ``max_len`` is the length in tokens (prompt and output) at which it ends with "length".
    ``next_span`` is the index of the first vision span that is not wholly computed, ``held``
    the digests whose encoder output this sequence keeps alive, ``sought`` those that it has looked
    for. ``digests`` name the full blocks
    of its tokens as far as they were needed; the first ``num_published`` of ``blocks`` can be
    found by them, the first ``num_noted`` by what they begin with too. ``num_cached`` prompt
    positions were not computed but found, at the start.
    ``scores`` are the log-probabilities of the prompt as far as they are known, from its second
    token on, or those of its ``lookup``; None if nobody waits for them.
    ``encode_seconds`` is what its pictures took of the encoder since the last output.
    ``speculation`` knows which tokens may come; None: it has not been asked yet.
    ``num_charged`` tokens were charged to the tenant, by this engine or one that died.
    ``added``, ``admitted`` and ``first_token`` are moments: it came, it first entered the batch,
    and its first token was known.
    """

    __slots__ = (
        "added",
        "admitted",
        "arrival",
        "blocks",
        "digests",
        "encode_seconds",
        "first_token",
        "held",
        "id",
        "items",
        "last_step",
        "lookup",
        "max_len",
        "next_span",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_known",
        "num_noted",
        "num_planned",
        "num_published",
        "prompt_len",
        "request",
        "scores",
        "sought",
        "spans",
        "speculation",
        "started",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self, request: EngineRequest, arrival: int, max_len: int, added: float = 0.0
    ) -> None:
        self.id = request.id
        self.request = request
        self.arrival = arrival
        self.token_ids = request.prompt + request.output
        self.prompt_len = len(request.prompt)
        self.max_len = max_len
        self.stop_ids = frozenset(request.sampling.stop_token_ids)
        self.items = request.items
        self.spans = [
            VisionSpan(item.digest, item.offset, item.length, item.step) for item in request.items
        ]
        self.status = Status.WAITING
        self.started = False
        self.num_computed = 0
        self.num_planned = 0
        self.num_known = len(self.token_ids)
        self.last_step = -1
        self.blocks: list[int] = []
        self.held: list[bytes] = []
        self.sought: set[bytes] = set()
        self.next_span = 0
        self.digests: list[bytes] = []
        self.num_published = 0
        self.num_noted = 0
        self.num_cached = 0
        self.num_charged = len(self.token_ids) if request.output else 0
        # One that goes on behind some output has reported them.
        self.lookup = request.sampling.lookup
        asked = request.sampling.prompt_logprobs >= 0 or self.lookup is not None
        asked = asked and not request.output
        self.scores: list[PromptLogprobs] | None = [] if asked else None
        self.encode_seconds: list[float] | None = None
        self.speculation: PromptLookup | None = None
        self.added = self.admitted = added
        self.first_token: float | None = None

    @property
    def first_unscored(self) -> int | None:
        """The first position whose log-probabilities are missing."""
        known = self.prompt_len if self.scores is None else len(self.scores)
        if self.lookup is None:
            return known if known < self.prompt_len - 1 else None
        return self.lookup.at[known] if known < len(self.lookup.at) else None

    @property
    def has_drawn(self) -> bool:
        """Whether a token was drawn here, behind all positions that were computed then."""
        return len(self.token_ids) > self.prompt_len + len(self.request.output)

    @property
    def most_cached(self) -> int:
        """Positions that may be found: never all, its last token is computed, and so is what must
        be scored."""
        unscored = self.first_unscored
        return len(self.token_ids) - 1 if unscored is None else unscored

    def scores_in(self, start: int, count: int) -> bool:
        """Whether somebody waits for log-probabilities behind so many positions."""
        if self.scores is None:
            return False
        end = min(start + count, self.prompt_len - 1)
        return self._scored_before(start) < self._scored_before(end)

    def take_scores(self, start: int, scores: list[PromptLogprobs]) -> None:
        """Add those from position ``start`` on; some may be known from before a preemption."""
        if self.scores is not None:
            self.scores += scores[len(self.scores) - self._scored_before(start) :]

    def _scored_before(self, position: int) -> int:
        return position if self.lookup is None else bisect.bisect_left(self.lookup.at, position)

    def speculate(self, most: int) -> tuple[int, ...]:
        """Tokens that may come next, ``most`` at most, and none that would end it. The first token
        comes alone, and a grammar takes one after the other."""
        if most < 1 or not self.has_drawn or self.request.sampling.grammar is not None:
            return ()
        if self.speculation is None:
            self.speculation = PromptLookup(self.request.prediction)
        found = self.speculation.find(self.token_ids, most)
        return tuple(itertools.takewhile(lambda token: token not in self.stop_ids, found))

    def keep_right(self, work: Work, right: int) -> None:
        """So many of the tokens on trial in ``work`` are this sequence's. What is in the cache of
        the others will be written over."""
        self.token_ids += work.speculated[:right]
        self.num_known += right
        wrong = len(work.speculated) - right
        self.num_computed -= wrong
        self.num_planned -= wrong

    def charge_encoding(self, digest: bytes, seconds: float) -> None:
        """A picture was encoded for this sequence; the first item that shows it pays."""
        spent = self.encode_seconds = self.encode_seconds or [0.0] * len(self.items)
        spent[next(i for i, item in enumerate(self.items) if item.digest == digest)] += seconds

    def tell_times(self, now: float, *, ended: bool) -> Times | None:
        """What the output of ``now`` tells. One that goes on behind some output began elsewhere."""
        if self.request.output:
            return None
        queue = prefill = 0.0
        if self.first_token is None:
            self.first_token = now
            queue, prefill = self.admitted - self.added, now - self.admitted
        return Times(queue, prefill, now - self.first_token if ended else None)

    def new_row(self) -> NewRow:
        """The whole sequence, for a runner that does not hold it."""
        return NewRow(
            self.id,
            list(self.token_ids),
            self.prompt_len,
            self.request.sampling,
            self.spans,
            self.blocks[: self.num_published],
        )

    def pass_spans(self) -> None:
        """Step over the vision spans that are wholly computed."""
        while self.next_span < len(self.spans):
            span = self.spans[self.next_span]
            if span.offset + span.length > self.num_computed:
                break
            self.next_span += 1

    @property
    def may_show(self) -> bool:
        """Whether a picture may stand at the next position to plan, or behind it."""
        if self.next_span == len(self.spans):
            return False
        last = self.spans[-1]
        return self.num_planned < last.offset + last.length

    def needed(self) -> list[bytes]:
        """Digests, each once, of the pictures that are not wholly computed but begun or planned."""
        digests: dict[bytes, None] = {}
        for span in self.spans[self.next_span :]:
            if span.offset >= self.num_planned:
                break
            digests[span.digest] = None
        return list(digests)

    def rewind(self) -> None:
        """Forget all progress but the tokens; the caller has freed what the sequence held."""
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_planned = 0
        self.next_span = 0
        self.blocks = []
        self.held = []
        self.num_published = 0
        self.num_noted = 0
