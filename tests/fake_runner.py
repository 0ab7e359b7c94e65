"""A runner without a model, for everything above the runner.

The next token is a function of the row's whole history: each position's state chains the state
of the position before, *as it stands in the paged cache*, with the token or the encoder output
that is put in. A position computed twice, in the wrong block, from a stale block or from another
row's picture therefore changes what is generated. On top of that every plan is checked against
the contract of ``engine.plan``, so that a mistake is named where it is made.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from engine.core import EngineCore
from engine.cost import CostModel, Load
from engine.plan import EncodeItem, NewRow, Sampled, StepPlan, StepResult, Work
from engine.speculation import max_draws
from wire.channel import Buffer
from wire.geometry import PromptFormat, VisionGeometry
from wire.messages import (
    EngineOutput,
    EngineRequest,
    Progress,
    PromptLogprobs,
    Ready,
    StepReport,
    VisionItem,
)
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

GEOMETRY = VisionGeometry(tile_size=2, tokens_per_tile=4)
TOKEN_BYTES = 10
TILE_BYTES = GEOMETRY.tokens_per_tile * TOKEN_BYTES
TILE_SECONDS = 0.25  # that encoding takes
VOCAB = 97
IMAGE = 96
EOS = 95


@dataclasses.dataclass
class Row:
    """What a runner keeps of one sequence."""

    tokens: list[int]
    prompt_len: int
    seed: int
    inputs: dict[int, tuple[bytes, int]]  # position -> (digest, index in the picture)
    likeliest: int = -1  # to name for each token of the prompt
    blocks: list[int] = dataclasses.field(default_factory=list)
    states: list[int] = dataclasses.field(default_factory=list)


class FakeRunner:
    """Obeys plans; raises AssertionError at the first one that breaks the contract.

    ``fail_at`` raises RuntimeError in that step; a token in ``bad_after`` makes the row whose
    last token it is answer with an error. EOS is drawn only with ``draws_eos``; with ``draws`` only
    so many tokens are, the first ones, so that texts repeat themselves.
    """

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[Progress], None] = lambda _: None,
        *,
        blocks: int = 64,
        max_model_len: int = 256,
        fail_at: int | None = None,
        bad_after: frozenset[int] = frozenset(),
        draws_eos: bool = False,
        draws: int = 0,
        cost: CostModel | None = None,
    ) -> None:
        progress(Progress("load", 1, 1))
        self.settings = settings
        self.start_cost = cost  # that steps take, exactly
        self.fail_at = fail_at
        self.bad_after = bad_after
        self.num_draws = draws or (EOS + 1 if draws_eos else EOS)
        self.rows: dict[str, Row] = {}
        self.raw: dict[str, dict[bytes, bytes]] = {}
        self.tensors: dict[bytes, list[bytes | None]] = {}  # None: the tile was not encoded
        self.cache: dict[tuple[int, int], int] = {}
        self.plans: list[StepPlan] = []
        self.preparing: dict[str, Future[Any]] = {}
        self._begun: StepPlan | None = None
        self._flying: tuple[StepPlan, list[Sampled]] | None = None
        self._scored: dict[int, list[list[PromptLogprobs]]] = {}  # by step
        self._ready = Ready(
            geometry=GEOMETRY,
            prompt_format=PromptFormat("hf", None, False),
            max_model_len=settings.max_model_len or max_model_len,
            max_positions=settings.max_model_len or max_model_len,
            vocab_size=VOCAB,
            eos_token_ids=(EOS,),
            block_size=settings.block_size,
            blocks_total=settings.num_kv_blocks or blocks,
            device="cpu",
            dtype="float32",
            attention="fake",
            parameters=0,
            vision_token_bytes=TOKEN_BYTES,
        )

    def ready(self) -> Ready:
        return self._ready

    def prepare(self, request: EngineRequest) -> Future[Any] | None:
        return self.preparing.get(request.id)

    def cost(self) -> CostModel | None:
        return self.start_cost

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        assert request.id not in self.raw, "uploaded twice"
        self.raw[request.id] = {item.digest: bytes(buffers[item.buffer]) for item in request.items}

    def begin(self, plan: StepPlan) -> None:
        assert self._begun is None, "a step is begun that nobody sampled"
        self.plans.append(plan)
        self._check_fences(plan)
        if plan.step == self.fail_at:
            raise RuntimeError("told to fail")
        for name in plan.removed:
            self.rows.pop(name, None)
            self.raw.pop(name, None)
        for name in plan.preempted:
            del self.rows[name]
        for digest in plan.drop:
            del self.tensors[digest]
        for new in plan.new_rows:
            self._add(new)
        for item in plan.encode:
            self._encode(item)
        self._check_budgets(plan)
        self._copy(plan)
        for work in plan.work:
            self._compute(work)
        self._scored[plan.step] = [self._score(work) for work in plan.work if work.score]
        self._begun = plan

    def sample(self) -> None:
        assert self._begun is not None
        assert self._flying is None, "the step before is not finished"
        plan, self._begun = self._begun, None
        drawn = [token for work in plan.work if work.sample for token in self._draw_all(work)]
        self._flying = plan, drawn

    def finish(self) -> StepResult:
        assert self._flying is not None, "nothing was sampled"
        (plan, sampled), self._flying = self._flying, None
        tile = self.start_cost.tiles if self.start_cost else TILE_SECONDS
        encoding = [item.tiles * tile for item in plan.encode]
        took = self.start_cost.predict(Load.of(plan)) if self.start_cost else 0.0
        return StepResult(plan.step, sampled, self._scored.pop(plan.step), encoding, took)

    def execute(self, plan: StepPlan) -> StepResult:
        """A step with nothing beside it."""
        self.begin(plan)
        self.sample()
        return self.finish()

    def _check_fences(self, plan: StepPlan) -> None:
        """A step that is not finished reads its rows' blocks and pictures."""
        fresh = {block for work in plan.work for block in work.new_blocks}
        for work in self._flying[0].work if self._flying else ():
            row = self.rows[work.id]
            assert not fresh & set(row.blocks), "an unfinished step reads a block handed out"
            read = {
                digest
                for position, (digest, _) in row.inputs.items()
                if work.start <= position < work.start + work.count
            }
            assert not read & set(plan.drop), "an unfinished step reads a picture dropped"

    def _add(self, new: NewRow) -> None:
        assert new.id not in self.rows, "a row is sent that the runner holds"
        assert 0 < new.prompt_len <= len(new.token_ids)
        inputs = {}
        for span in new.spans:
            for index in range(span.length):
                inputs[span.offset + index] = (span.digest, index)
        assert len(inputs) == sum(span.length for span in new.spans)
        row = Row(list(new.token_ids), new.prompt_len, new.sampling.seed, inputs)
        row.likeliest, row.blocks = new.sampling.prompt_logprobs, list(new.blocks)
        found = len(row.blocks) * self._ready.block_size
        assert found < len(row.tokens), "nothing is left to compute"
        self.rows[new.id] = row

    def _encode(self, item: EncodeItem) -> None:
        raw = self.raw[item.request_id][item.digest]
        per_token = GEOMETRY.tile_bytes // GEOMETRY.tokens_per_tile
        tensor = self.tensors.setdefault(item.digest, [None] * (len(raw) // per_token))
        first = item.start * GEOMETRY.tokens_per_tile
        end = first + item.tiles * GEOMETRY.tokens_per_tile
        assert item.tiles > 0
        assert end <= len(tensor), "a tile that the picture does not have"
        for i in range(first, end):
            assert tensor[i] is None, "encoded although it exists"
            tensor[i] = raw[i * per_token : (i + 1) * per_token]

    def _check_budgets(self, plan: StepPlan) -> None:
        names = [work.id for work in plan.work]
        assert len(names) == len(set(names)), "a row works twice"
        assert {new.id for new in plan.new_rows} <= set(names), "a new row without work"
        assert not {new.id for new in plan.new_rows} & set(plan.preempted), "preempted for nothing"
        assert len(self.rows) <= self.settings.max_num_seqs
        assert sum(work.count for work in plan.work) <= self.settings.max_num_batched_tokens
        drawn = sum(work.sample + len(work.speculated) for work in plan.work)
        assert drawn <= max_draws(self.settings, "cpu")
        tiles = sum(item.tiles for item in plan.encode)
        assert tiles <= self.settings.max_num_encoder_tiles
        size = sum(len(tensor) for tensor in self.tensors.values()) * TOKEN_BYTES
        assert size <= self.settings.encoder_cache_bytes or len(self.tensors) == 1
        fresh = [block for work in plan.work for block in work.new_blocks]
        assert len(fresh) == len(set(fresh)), "a block is handed out twice"
        new = {row.id for row in plan.new_rows}  # may share what others compute in this step
        old = (row for name, row in self.rows.items() if name not in new)
        owned = {block for row in old for block in row.blocks}
        assert not owned & set(fresh), "a block is handed out that a row reads"

    def _copy(self, plan: StepPlan) -> None:
        """Blocks as they are, with what is stale in them; their rows go on from there."""
        size = self._ready.block_size
        begun = []
        for work in plan.work:
            row = self.rows[work.id]
            missing = work.start - max(len(row.states), len(row.blocks) * size)
            if not row.states and missing:
                assert 0 < missing < size, "positions are not contiguous"
                begun.append(work.new_blocks[0])
        assert [copy.target for copy in plan.copies] == begun, "positions that nobody computed"
        for copy in plan.copies:
            for slot in range(size):
                self.cache[copy.target, slot] = self.cache.get((copy.source, slot), 0)

    def _compute(self, work: Work) -> None:
        row = self.rows[work.id]
        size = self._ready.block_size
        row.blocks += work.new_blocks
        assert all(0 <= block < self._ready.blocks_total for block in work.new_blocks)
        assert work.count > 0
        if not row.states:  # it goes on from what others left, or computed before it in this step
            slots = ((row.blocks[at // size], at % size) for at in range(work.start))
            row.states = [self.cache[slot] for slot in slots]
        assert work.start == len(row.states), "positions are not contiguous"
        tokens = [*row.tokens, *work.speculated]
        assert work.start + work.count <= len(tokens), "computed beyond the known tokens"
        assert work.start + work.count <= len(row.blocks) * size, "no block for a position"
        assert work.sample == (work.start + work.count == len(tokens))
        if work.speculated:
            assert work.sample, "on trial in place of a token that is known"
            assert self._flying is None, "on trial behind a token that is not known"
            assert len(tokens) < self._ready.max_model_len, "nothing may be drawn behind it"
        for position in range(work.start):
            slot = row.blocks[position // size], position % size
            assert self.cache[slot] == row.states[position], "a cached position was overwritten"
        for position in range(work.start, work.start + work.count):
            shown = self._input(row, position, tokens[position])
            state = zlib.crc32(shown, row.states[-1] if row.states else 0)
            self.cache[row.blocks[position // size], position % size] = state
            row.states.append(state)

    def _score(self, work: Work) -> list[PromptLogprobs]:
        row = self.rows[work.id]
        assert row.likeliest >= 0, "scored although nobody asked"
        entries = []
        for position in range(work.start, min(work.start + work.count, row.prompt_len - 1)):
            state, token = row.states[position], row.tokens[position + 1]
            top = [(state % VOCAB, float(number)) for number in range(row.likeliest)]
            entries.append(PromptLogprobs(-float(state % 1000 + token), state % 7, top))
        assert entries, "nothing to score"
        return entries

    def _draw_all(self, work: Work) -> list[Sampled]:
        """Behind the last token, and behind those on trial that are right; what is computed of
        others is forgotten."""
        row = self.rows[work.id]
        found = [self._draw(work)]
        for token in work.speculated:
            if found[-1].error is not None or found[-1].token_id != token:
                break
            found.append(self._draw(work))
        if work.speculated:
            del row.states[len(row.tokens) - 1 :]
        return found

    def _draw(self, work: Work) -> Sampled:
        row = self.rows[work.id]
        state = row.states[len(row.tokens) - 1]
        if row.tokens[-1] in self.bad_after:
            row.tokens.append(0)  # a step under way behind it computes something
            return Sampled(work.id, 0, "the logits are not finite")
        draw = zlib.crc32(b"%d %d" % (row.seed, len(row.tokens) - row.prompt_len), state)
        row.tokens.append(draw % self.num_draws)
        return Sampled(work.id, row.tokens[-1])

    def _input(self, row: Row, position: int, token: int) -> bytes:
        if position in row.inputs:
            digest, index = row.inputs[position]
            assert token == IMAGE
            shown = self.tensors[digest][index]
            assert shown is not None, "reads a tile that is not encoded"
            return b"picture" + shown
        return b"token%d" % token


def picture(seed: int, tiles: int = 1) -> tuple[bytes, bytes]:
    """A picture nobody else has: its digest and its raw tiles."""
    size = GEOMETRY.tile_bytes * tiles
    raw = b"".join(zlib.crc32(b"%d %d" % (seed, i)).to_bytes(4, "big") for i in range(size))
    return b"picture-%d-%d" % (seed, tiles), raw[:size]


def request(
    name: str,
    *parts: int | tuple[int, int],
    max_tokens: int = 8,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    salt: bytes = b"",
    prompt_logprobs: int = -1,
    **fields: Any,
) -> tuple[EngineRequest, list[bytes]]:
    """A request and its buffers; a part is a number of text tokens or (picture seed, tiles)."""
    prompt: list[int] = []
    items: list[VisionItem] = []
    buffers: list[bytes] = []
    for part in parts:
        if isinstance(part, int):
            prompt += [(7 * len(prompt) + 3 * seed + i) % IMAGE for i in range(part)]
            continue
        digest, raw = picture(*part)
        length = part[1] * GEOMETRY.tokens_per_tile
        items.append(VisionItem(digest, len(prompt), length, part[1], len(buffers)))
        prompt += [IMAGE] * length
        buffers.append(raw)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=(*stop, EOS),
        prompt_logprobs=prompt_logprobs,
    )
    return EngineRequest(name, prompt, sampling, items, salt, **fields), buffers


class Engine:
    """A core over a FakeRunner; remembers what each request got and checks every step."""

    def __init__(
        self,
        *,
        draws_eos: bool = False,
        draws: int = 0,
        bad_after: frozenset[int] = frozenset(),
        cost: CostModel | None = None,
        **settings: Any,
    ) -> None:
        defaults = {"block_size": 4, "num_kv_blocks": 64, "speculative_tokens": 0}
        defaults |= {"max_num_batched_tokens": 64}
        self.settings = EngineSettings(**{**defaults, **settings})
        self.runner = FakeRunner(
            self.settings, draws_eos=draws_eos, draws=draws, bad_after=bad_after, cost=cost
        )
        self.core = EngineCore(self.settings, self.runner, self.runner.ready())
        self.scheduler = self.core._scheduler
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, EngineOutput] = {}
        self.scores: dict[str, list[PromptLogprobs]] = {}
        self.encode_seconds: dict[str, list[list[float]]] = {}  # of each output that has some

    def add(self, name: str, *parts: int | tuple[int, int], **options: Any) -> None:
        self.core.add(*request(name, *parts, **options))

    def add_tokens(self, name: str, prompt: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(EOS,))
        self.core.add(EngineRequest(name, prompt, sampling))

    def step(self) -> StepPlan:
        """One step; returns the last plan that was executed."""
        report = self.core.step()
        assert report is not None
        self.take(report)
        return self.runner.plans[-1]

    def take(self, report: StepReport) -> None:
        self.scheduler.check()
        for output in report.outputs:
            assert output.id not in self.ends, "an output after the last one"
            if output.prompt_logprobs is not None:
                assert output.id not in self.tokens, "not in the first output"
                self.scores[output.id] = output.prompt_logprobs
            if output.encode_seconds is not None:
                self.encode_seconds.setdefault(output.id, []).append(output.encode_seconds)
            self.tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[output.id] = output
        for name, sequence in self.scheduler._sequences.items():
            known = len(sequence.request.prompt + sequence.request.output)
            assert sequence.token_ids[known:] == self.tokens.get(name, [])

    def finish(self) -> None:
        """Step until nothing is left, then check that nothing is held."""
        steps = 0
        while (report := self.core.step()) is not None:
            self.take(report)
            steps += 1
            assert steps < 5000, "this never ends"
        assert not self.core.has_work
        assert self.scheduler.stats.blocks_used == 0
        assert not self.runner.rows
        assert not self.runner.raw


def alone(*parts: int | tuple[int, int], **options: Any) -> list[int]:
    """The tokens of a request that has the engine to itself, its prompt in one chunk."""
    return alone_with_scores(*parts, **options)[0]


def alone_with_scores(
    *parts: int | tuple[int, int], **options: Any
) -> tuple[list[int], list[PromptLogprobs] | None]:
    """The same, and the log-probabilities of its prompt."""
    draws_eos, draws = options.pop("draws_eos", False), options.pop("draws", 0)
    bad_after = options.pop("bad_after", frozenset())
    engine = Engine(
        num_kv_blocks=512,
        max_num_batched_tokens=4096,
        max_num_encoder_tiles=512,
        max_model_len=options.pop("max_model_len", 256),
        draws_eos=draws_eos,
        draws=draws,
        bad_after=bad_after,
        enable_prefix_caching=False,
    )
    engine.add("alone", *parts, **options)
    engine.finish()
    assert not any(work.start for work in engine.runner.plans[0].work)
    return engine.tokens["alone"], engine.scores.get("alone")


def crowded(pipelined: str) -> Engine:
    """It has run three requests, two with a picture, in memory for fewer of each."""
    engine = Engine(
        num_kv_blocks=9,
        encoder_cache_bytes=TILE_BYTES,
        enable_prefix_caching=False,
        async_scheduling=pipelined,
    )
    engine.add("a", 6, max_tokens=16)
    engine.add("b", 3, (1, 1), max_tokens=16, seed=1)
    engine.add("c", 3, (2, 1), max_tokens=16, seed=2)
    engine.finish()
    return engine
