"""Decides what each step computes.

There is no prefill phase and no decode phase. Every sequence has some positions computed and
some tokens known, and each step lets the first catch up with the second: by one for a sequence
that generates, by a chunk for one whose prompt is new, by everything for one that was preempted.
One loop covers them all.

EngineCore calls ``plan``, has the plan executed, then calls ``commit`` with the result; requests
may be added and aborted at any time in between. One more step may be planned while the last is
under way: it goes on behind tokens that are not known yet, and where one of them turns out to be
the last, its work is dropped at its commit. What such a step reads is fenced: blocks and encoder
outputs of a sequence that ends or is preempted become free when its last step is committed.

The Scheduler owns the sequences, the block pool and the logical vision cache. It never sees a
tensor nor a clock, and it is deterministic: the same calls give the same plans, byte for byte. What
time it is it is told, and tells how long sequences took; it decides nothing by it. How
long steps take is said with each call of ``plan``, by the cost model given to it: beside rows that
generate, the step's work on prompts and pictures is cut to what the budget leaves.

Order is strict. Running sequences come before waiting ones; the policy (engine.waiting) says how
they are sorted and which one waits at the head, and what does not fit behind the head waits with
it. This is what makes it free of deadlock: the first sequence can always have every block (later
ones are preempted for it) and, once entries in use are released, the whole vision cache (while one
sequence waits for room there, no later one may take any). It is free of starvation where the
policy is: a sequence that waits comes to the head in the end, except behind better priorities.
"""

import logging
import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Collection, Iterator
from functools import partial

from engine.blocks import BlockPool
from engine.cost import Allowance, CostModel, step_budget
from engine.draft import Draft
from engine.gate import Gate
from engine.plan import Copy, Sampled, StepPlan, StepResult, Work
from engine.reuse import Prefixes
from engine.sequence import Refused, Sequence, Status
from engine.speculation import behind, follow, max_speculated
from engine.vision_cache import VisionCache
from engine.waiting import QUEUES
from wire.logs import NOBODY, about
from wire.messages import EngineOutput, EngineRequest, EngineStats, Ready
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)


class Scheduler:
    """The sequences of one engine and the two resources they compete for."""

    def __init__(self, settings: EngineSettings, ready: Ready) -> None:
        self._block_size = ready.block_size
        self._max_model_len = ready.max_model_len
        self._max_tokens = settings.max_num_batched_tokens
        self._max_tiles = settings.max_num_encoder_tiles
        self._max_seqs = settings.max_num_seqs
        self._step_seconds = step_budget(settings, ready.device)
        self._max_speculated = max_speculated(settings, ready.device)
        self._pool = BlockPool(ready.blocks_total)
        self._prefixes = Prefixes(self._pool, ready.block_size, settings.enable_prefix_caching)
        # Blocks that admission leaves to the sequences already running.
        self._watermark = max(1, ready.blocks_total // 100)
        self._vision = VisionCache(settings.encoder_cache_bytes)
        self._gate = Gate(self._vision, ready)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._waiting = QUEUES[settings.scheduling_policy]()
        self._removed: list[str] = []
        self._planned: deque[tuple[StepPlan, list[Sequence]]] = deque()  # and not committed
        self._fenced: list[tuple[int, list[int], list[bytes]]] = []  # until that step: what
        self._arrivals = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = self._prefix_queries = 0
        self._generated_tokens = 0
        self._preemptions = 0
        self._speculated_tokens = self._accepted_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step is needed, be it only to have the runner forget something."""
        return bool(self._sequences or self._removed or self._vision.has_dropped)

    @property
    def stats(self) -> EngineStats:
        """Gauges of this moment and the counters."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_used=self._pool.total - self._pool.num_free,
            blocks_total=self._pool.total,
            vision_bytes=self._vision.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            encoded_tiles=self._gate.encoded_tiles,
            preemptions=self._preemptions,
            cached_tokens=self._cached_tokens,
            prefix_queries=self._prefix_queries,
            vision_queries=self._gate.queries,
            vision_hits=self._gate.hits,
            speculated_tokens=self._speculated_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def add(self, request: EngineRequest, now: float = 0.0) -> None:
        """Queue a request. Raises Refused if it could never be computed."""
        length = len(request.prompt) + len(request.output)
        if request.id in self._sequences or request.id in self._removed:
            raise Refused("a request with this id is still being handled")
        if not request.prompt or request.sampling.max_tokens <= len(request.output):
            raise Refused("there is nothing to compute")
        if length + 1 > self._max_model_len:
            raise Refused(
                f"the prompt has {length} tokens; with one more for the answer that is over "
                f"the limit of {self._max_model_len}"
            )
        capacity = self._pool.total * self._block_size
        if length > capacity:
            raise Refused(f"the prompt has {length} tokens, the cache has room for {capacity}")
        if not 0 < request.weight < math.inf:
            raise Refused("the weight must be a finite number above 0")
        # The last token of a sequence is never computed, so it needs no place in the cache.
        asked = len(request.prompt) + request.sampling.max_tokens
        max_len = min(self._max_model_len, asked, capacity + 1)
        sequence = Sequence(request, self._arrivals, max_len, now)
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self._waiting.push(sequence)

    def abort(self, request_id: str) -> None:
        """End a request without an output and free what it holds; unknown ids are ignored.

        Between plan and commit this is safe too: what is freed here can only be used by a later
        plan, and the runner executes plans in order.
        """
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, "abort")

    def origin(self, request_id: str) -> str:
        """Who asked for a request, for the log; of an unknown one nobody did."""
        sequence = self._sequences.get(request_id)
        return NOBODY if sequence is None else sequence.request.origin

    def flush(self) -> None:
        """Let no later request find what was cached until now."""
        self._prefixes.flush(self._arrivals)
        self._vision.flush()

    def plan(self, cost: CostModel | None = None, now: float = 0.0) -> StepPlan | None:
        """The next step, or None if there is nothing to do before a commit.

        It keeps to the step budget as ``cost`` predicts it; without one, and while nobody
        generates and no prompt has ended, it may take any time.
        ``commit`` must follow, after that of the step before: at most two are under way.
        """
        assert len(self._planned) < 2, "two plans were not committed"
        if not self.has_work:
            return None
        allow = partial(self._allow, cost)
        draft = Draft(self._steps, self._max_tokens, self._max_tiles, allow)
        if self._waiting.preempts:
            self._make_way(draft)
        self._plan_running(draft)
        if not draft.preempted:
            self._admit(draft, now)
        self._waiting.charge(draft.sequences)
        if not (draft.work or draft.preempted or self._removed or self._vision.has_dropped):
            assert self._planned or not self._sequences, "no sequence can go on: this is a bug"
            return None
        removed, self._removed = self._removed, []
        plan = StepPlan(
            step=self._steps,
            new_rows=draft.new_rows,
            work=draft.work,
            encode=draft.encode,
            drop=self._vision.take_dropped(),
            removed=removed,
            preempted=draft.preempted,
            copies=draft.copies,
        )
        self._steps += 1
        self._planned.append((plan, draft.sequences))
        return plan

    def _plan_running(self, draft: Draft) -> None:
        running, block_size = self._running, self._block_size
        each = (1 + self._max_speculated) // max(len(running), 1) - 1
        index = 0
        while index < len(running) and draft.tokens > 0:
            sequence = running[index]
            index += 1
            if sequence.num_known >= sequence.max_len:
                continue  # the token being drawn is its last
            count = missing = sequence.num_known - sequence.num_planned
            if missing > 1:
                # One token is left for every later row: a long prompt delays no stream.
                count = min(count, max(1, draft.tokens - (len(running) - index)))
            if missing > 1 or sequence.may_show:
                count = self._gate.reach(sequence, count, draft)
                if count == 0:
                    continue
            new_blocks: list[int] = []
            if sequence.num_planned + count > len(sequence.blocks) * block_size:
                grown = self._grow(sequence, draft)
                if grown is None:
                    continue
                new_blocks = grown
            speculated: tuple[int, ...] = ()
            if each > 0 and missing == 1:
                most = min(each, draft.tokens - 1 - (len(running) - index) - bool(self._waiting))
                speculated = self._speculate(sequence, most)
            draft.add(sequence, count, new_blocks, speculated)
            if count > 1:
                self._prefixes.announce(sequence)

    def _speculate(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Tokens to compute on trial behind its last one; no block is taken for them, and what is
        drawn behind the last of them may be the last of the sequence."""
        room = len(sequence.blocks) * self._block_size - sequence.num_known
        left = sequence.max_len - sequence.num_known - 1
        return sequence.speculate(min(most, room, left))

    def _grow(self, sequence: Sequence, draft: Draft) -> list[int] | None:
        """One more block, if need be from the sequences that arrived last; None: wait for it.

        The very last one just waits: it is preempted as soon as an earlier one needs its blocks,
        and goes on without recomputing anything if one of them ends before.
        """
        while (blocks := self._pool.allocate(1)) is None:
            if self._fenced:
                return None  # some come free when the step under way is committed
            if self._running[-1] is sequence:
                return None
            self._preempt_last(draft)
        sequence.blocks += blocks
        return blocks

    def _preempt_last(self, draft: Draft) -> None:
        victim = self._running.pop()
        self._free(victim)
        victim.rewind()
        self._waiting.put_back(victim)
        draft.preempted.append(victim.id)
        self._preemptions += 1
        with about(victim.request.origin):
            logger.debug("request=%s preempted tokens=%d", victim.id, len(victim.token_ids))

    def _make_way(self, draft: Draft) -> None:
        """Preempt the last sequences for a better one that waits, if that gives it room.

        It starts in the next step, when their blocks are free.
        """
        head, running = self._waiting.head(), self._running
        if head is None or not running or not self._waiting.outranks(head, running[-1]):
            return
        if self._fenced:
            return  # some blocks come free anyway when the step under way is committed
        hits = self._prefixes.find(head)
        need = -(-len(head.token_ids) // self._block_size) - len(hits)
        need += self._pool.count_free(hits)
        free, kept = self._pool.num_free, len(running)
        while kept >= self._max_seqs or need > free - (self._watermark if kept else 0):
            if not kept or not self._waiting.outranks(head, running[kept - 1]):
                return
            kept -= 1
            free += self._pool.count_single(set(running[kept].blocks).difference(hits))
        while len(running) > kept:
            self._preempt_last(draft)

    def _admit(self, draft: Draft, now: float) -> None:
        """Start waiting sequences, in order, while blocks for all their known tokens are free.

        All blocks are taken at once, so a prompt that has started always finishes its prefill:
        only generated tokens ever need another block.
        """
        while draft.tokens > 0 and len(self._running) < self._max_seqs:
            sequence = self._waiting.head()
            if sequence is None:
                return
            hits = self._prefixes.find(sequence)
            need = -(-len(sequence.token_ids) // self._block_size) - len(hits)
            room = self._pool.num_free - (self._watermark if self._running else 0)
            if need + self._pool.count_free(hits) > room:
                return
            source, begun = self._prefixes.find_part(sequence, len(hits))
            start = len(hits) * self._block_size + begun
            sequence.num_computed = sequence.num_planned = start
            sequence.pass_spans()
            missing = sequence.num_known - sequence.num_planned
            count = self._gate.reach(sequence, min(missing, draft.tokens), draft)
            if count == 0:
                sequence.rewind()
                return
            self._pool.share(hits)
            blocks = self._pool.allocate(need)
            assert blocks is not None
            if begun:
                draft.copies.append(Copy(source, blocks[0]))
            self._waiting.take(sequence)
            sequence.blocks = hits + blocks
            sequence.num_published = sequence.num_noted = len(hits)
            sequence.status = Status.RUNNING
            insort(self._running, sequence, key=self._waiting.rank)
            if not sequence.started:
                sequence.started = True
                sequence.admitted = now
                sequence.num_cached = min(sequence.num_computed, sequence.prompt_len)
                if not sequence.request.output:  # else the engine that died has counted it
                    self._prompt_tokens += sequence.prompt_len
                    self._cached_tokens += sequence.num_cached
                    if self._prefixes.enabled:
                        scored = sequence.first_unscored  # what is behind it is not looked up
                        self._prefix_queries += sequence.prompt_len if scored is None else scored
            draft.new_rows.append(sequence.new_row())
            draft.add(sequence, count, blocks)
            self._prefixes.announce(sequence)

    def _allow(self, cost: CostModel | None, draft: Draft) -> Allowance:
        """The time for prompts and pictures; ``draft`` holds none yet, only rows that generate."""
        if cost is None or self._step_seconds == math.inf:
            return Allowance()
        contexts = [work.start for work in draft.work] + [
            s.num_planned
            for s in self._running
            if s.num_known - s.num_planned == 1
            and s.num_known < s.max_len
            and s.last_step < draft.step
        ]
        return Allowance.beside(cost, self._step_seconds, contexts)

    def commit(self, result: StepResult, now: float = 0.0) -> list[EngineOutput]:
        """Take in what a planned step computed; the outputs stand in the plan's order."""
        assert self._planned, "there is no plan to commit"
        plan, sequences = self._planned.popleft()
        assert result.step == plan.step, "this result belongs to another plan"
        for item, seconds in zip(plan.encode, result.encode_seconds, strict=True):
            if (payer := self._sequences.get(item.request_id)) is not None:
                payer.charge_encoding(item.digest, seconds)
        outputs: list[EngineOutput] = []
        sampled, scored = iter(result.sampled), iter(result.scored)
        caching, block_size, running = self._prefixes.enabled, self._block_size, Status.RUNNING
        for sequence, work in zip(sequences, plan.work, strict=True):
            drawn = next(sampled) if work.sample else None
            right: Collection[Sampled] = ()
            if work.speculated and drawn is not None:
                right, drawn = self._keep_right(sequence, work, drawn, sampled)
            if work.score:
                sequence.take_scores(work.start, next(scored))
            if sequence.status is running:  # and not preempted since
                sequence.num_computed += work.count
                full = sequence.num_computed // block_size
                if caching and work.sample and full > sequence.num_noted:
                    self._prefixes.keep(sequence)
                if sequence.held:
                    self._release_passed(sequence)
            elif sequence.status is Status.ENDED:  # aborted, or ended by the step before
                if drawn is not None and drawn.error is not None:
                    self._prefixes.distrust(sequence)
                continue
            if drawn is not None:
                assert drawn.id == sequence.id, "the result is not in the plan's order"
                output = self._accept(sequence, drawn, now)
                outputs += behind(right, output) if right else (output,)
        assert next(sampled, None) is None, "more was sampled than planned"
        self._lift_fences(plan.step)
        return outputs

    def _lift_fences(self, step: int) -> None:
        fenced, self._fenced = self._fenced, []
        for last_step, blocks, held in fenced:
            if last_step <= step:
                self._give_back(blocks, held)
            else:
                self._fenced.append((last_step, blocks, held))

    def _keep_right(
        self, sequence: Sequence, work: Work, drawn: Sampled, sampled: Iterator[Sampled]
    ) -> tuple[list[Sampled], Sampled]:
        """The draws of tokens on trial that were right, and the one behind them."""
        right, drawn = follow(work, drawn, sampled)
        if sequence.status is Status.RUNNING:  # else it was aborted: none is preempted before this
            sequence.keep_right(work, len(right))
            self._waiting.charge((sequence,))
            self._generated_tokens += len(right)
            self._speculated_tokens += len(work.speculated)
            self._accepted_tokens += len(right)
        return right, drawn

    def _accept(self, sequence: Sequence, drawn: Sampled, now: float) -> EngineOutput:
        if drawn.error is not None or drawn.stuck:
            ending = "stuck" if drawn.error is None else "error"
            self._end(sequence, ending)
            if not drawn.stuck:
                self._prefixes.distrust(sequence)
            return EngineOutput(sequence.id, [], ending, error=drawn.error)
        token = drawn.token_id
        sequence.token_ids.append(token)
        scores, sequence.scores = sequence.scores, None
        spent, sequence.encode_seconds = sequence.encode_seconds, None
        self._generated_tokens += 1
        reason = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.token_ids) >= sequence.max_len:
            reason = "length"
        if reason:
            self._end(sequence, reason)
        times = None
        if reason or sequence.first_token is None:
            times = sequence.tell_times(now, ended=reason is not None)
        stop = token if reason == "stop" else None
        logprobs = None if drawn.logprobs is None else [drawn.logprobs]
        found = sequence.num_cached
        return EngineOutput(
            *(sequence.id, [token], reason, stop, found, None, logprobs, scores, spent, times)
        )

    def _release_passed(self, sequence: Sequence) -> None:
        """Release every held encoder output that no position under way or begun reads."""
        sequence.pass_spans()
        needed = sequence.needed()
        for digest in sequence.held:
            if digest not in needed:
                self._vision.release(digest)
        sequence.held = needed

    def _end(self, sequence: Sequence, how: str) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._free(sequence)
        sequence.status = Status.ENDED
        del self._sequences[sequence.id]
        self._removed.append(sequence.id)
        with about(sequence.request.origin):
            logger.debug(
                "request=%s ended how=%s tokens=%d", sequence.id, how, len(sequence.token_ids)
            )

    def _free(self, sequence: Sequence) -> None:
        self._prefixes.leave(sequence)
        if self._planned and sequence.last_step >= self._planned[0][0].step:
            self._fenced.append((sequence.last_step, sequence.blocks, sequence.held))
        else:
            self._give_back(sequence.blocks, sequence.held)

    def _give_back(self, blocks: list[int], held: list[bytes]) -> None:
        self._pool.free(blocks)
        for digest in held:
            self._vision.release(digest)

    def check_idle(self) -> None:
        """Raise AssertionError if anything is still held although no sequence is left."""
        if not (self._sequences or self._planned):
            assert self._pool.num_free == self._pool.total, "blocks leaked"
            assert self._vision.num_referenced == 0, "encoder outputs leaked"

    def check(self) -> None:
        """Raise AssertionError where the state between two steps contradicts itself."""
        self._pool.check()
        self._vision.check()
        self.check_idle()
        self._waiting.check(self._running)
        everyone = [*self._running, *self._waiting]
        ranks = [self._waiting.rank(sequence) for sequence in self._running]
        assert ranks == sorted(ranks), "the sequences that run are out of order"
        assert {s.id for s in everyone} == set(self._sequences)
        under_way = [plan.step for plan, _ in self._planned]
        owned: list[int] = []
        references = set()
        for step, blocks, held in self._fenced:
            assert step in under_way, "a fence stands although its step is committed"
            owned += blocks
            references |= set(held)
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_computed < len(sequence.token_ids) < sequence.max_len
            assert sequence.num_computed <= sequence.num_planned < sequence.num_known
            if sequence.last_step not in under_way:
                assert sequence.num_planned == sequence.num_computed
            assert sequence.num_known - len(sequence.token_ids) in (0, 1)
            assert sequence.num_planned <= len(sequence.blocks) * self._block_size
            assert sequence.held == sequence.needed(), (
                "an encoder output is held too long or not long enough"
            )
            owned += sequence.blocks
            references |= set(sequence.held)
        for sequence in self._waiting:
            assert sequence.status is Status.WAITING
            assert not any((sequence.num_planned, sequence.blocks, sequence.held))
        assert Counter(owned) == self._pool.references, "references and owners disagree"
        assert len(references) == self._vision.num_referenced
