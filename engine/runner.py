"""ModelRunner: obeys a StepPlan with the model, and decides nothing.

Owned by EngineCore, called from one thread. It holds all tensors of the engine: weights, KV
cache, rows, encoder outputs. What is kept, computed and dropped is the scheduler's decision.

A step has three parts. ``begin`` applies the plan and launches the forward pass; a token that the
step before draws is taken from the device, where alone it may be known. ``sample`` launches the
draw, ``finish`` waits for the ids. Only ``finish`` waits for the device.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.choices import choose_device, choose_dtype, choose_max_model_len, default_threads
from engine.clock import Moment, moment, seconds_between
from engine.core import EngineCore
from engine.cost import CostModel
from engine.grammar import Grammars
from engine.graphs import (
    Capture,
    DecodeGraph,
    DecodeGraphs,
    TileGraphs,
    capture_on,
    row_sizes,
    tile_sizes,
)
from engine.memory import LARGE, kv_blocks, largest_step, measure, shallow, within
from engine.plan import Sampled, StepPlan, StepResult, Work
from engine.rows import DeviceRows, Rows, StepBatch
from engine.sampling.logprobs import Likely, Scored, asked, logprobs, score
from engine.sampling.sampler import NOTHING_LEFT, draws, sample, sample_plain, sound
from engine.speculation import max_draws, max_speculated
from engine.trial import Trial
from engine.vision import EncoderOutputs, Encoding, NoOutputs
from model import build_model, load_config
from model.attention import choose
from model.kv_cache import KVCache
from model.parallel import Group
from model.single import SingleTokens, single_tokens
from model.transfer import to_device, to_host
from wire.channel import Buffer
from wire.heap import return_what_is_freed
from wire.messages import EngineRequest, Progress, Ready, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings, SettingError

logger = logging.getLogger(__name__)

_NO_TOKENS = torch.zeros(0)
_NOT_FINITE = "the model's output is not a number"


@dataclasses.dataclass
class _Begun:
    """A step whose forward pass is launched: the rows to draw for, and their logits [R, V]."""

    step: int
    names: list[str]
    logits: Tensor | None = None  # None without rows, in later stages, and where there are tokens
    scored: Scored | None = None
    encoding: Encoding | None = None
    graph: DecodeGraph | None = None  # that made the logits, padded ones behind
    tokens: Tensor = _NO_TOKENS  # [R] int64, where the forward pass drew them
    began: Moment = None


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A step that is sampled; the tensors are on their way to the host until ``arrived``."""

    step: int
    began: Moment
    ended: Moment
    names: list[str]
    tokens: Tensor  # [R] int64
    likely: Likely | None
    scored: Scored | None
    encoding: Encoding | None
    arrived: torch.cuda.Event | None  # None: the device is the host


class ModelRunner:
    """Loads the model of ``settings`` and runs steps.

    Raises CheckpointError if the checkpoint cannot be served, ValueError if a setting does not
    fit it. ``progress`` is told how far loading is. Every rank of ``group`` makes one of the same
    settings, and calls it with the same plans.
    """

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[Progress], None] = lambda _: None,
        group: Group | None = None,
    ) -> None:
        self._group = group = group or Group()
        device = group.device or torch.device(choose_device(settings))
        progress(Progress("config"))
        folder = Path(settings.model)
        config = load_config(folder)
        config = dataclasses.replace(config, geometry=config.geometry.limited(settings.max_tiles))
        if device.type == "cpu":
            return_what_is_freed(LARGE)
            torch.set_num_threads(settings.threads or default_threads(config))
        if settings.quantization.startswith("fp8") and device.type != "cuda":
            raise SettingError(f"quantization {settings.quantization} needs a CUDA device")
        dtype = choose_dtype(settings, config, device)
        self._model = build_model(
            config,
            folder,
            device=device,
            dtype=dtype,
            quantization=settings.quantization,
            progress=_reporter(progress),
            group=group,
        )
        self._attention = choose(
            settings.attention_backend, self._model.text, device, dtype, settings.block_size
        )
        self._device = device
        progress(Progress("cache"))
        limit = choose_max_model_len(settings, config)
        # No more than a step may draw for: memory is set aside for the logits of so many.
        self._score_at_once = min(64, settings.max_num_seqs)
        self._draws = group.is_first
        self._grammars = Grammars.load(folder, config.eos_token_ids) if self._draws else None
        if settings.num_kv_blocks:
            limit = within(settings.num_kv_blocks, settings, limit)
        step = self._profile(settings, limit)
        blocks = kv_blocks(settings, self._model, limit, step)
        limit = within(blocks, settings, limit)
        self._allocate(settings, blocks, limit)
        self._ready = Ready(
            geometry=config.geometry,
            prompt_format=config.prompt_format,
            max_model_len=limit,
            max_positions=config.max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            block_size=settings.block_size,
            blocks_total=blocks,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            attention=self._attention.name,
            parameters=self._model.parameter_count,
            vision_token_bytes=config.text.hidden_size * dtype.itemsize,
            grammars=self._grammars is not None,
            speculates=max_speculated(settings, device.type) > 0,
        )
        progress(Progress("warm-up"))
        self._capture(settings)
        self._make_vision(settings)
        self._cost: CostModel | None = None
        self._warm_up(settings)
        # Without the warm-up's picture.
        self._make_vision(settings)
        # Where there are ranks, who leads them must do this with all of them.
        if settings.step_budget_ms and group.is_alone:
            self._cost = Trial(self, settings).fit()

    def _allocate(self, settings: EngineSettings, blocks: int, max_model_len: int) -> None:
        """Make everything that steps work on, empty."""
        text, device, size = self._model.text, self._model.device, settings.block_size
        text = dataclasses.replace(text, layers=len(self._model.decoder.layers))
        self._kv = KVCache(
            text, blocks=blocks, block_size=size, device=device, dtype=self._model.dtype
        )
        capacity = max_draws(settings, device.type)
        self._rows = Rows(capacity=capacity, max_len=max_model_len, block_size=size, device=device)
        self._device_rows = DeviceRows(
            capacity=capacity, max_blocks=-(-max_model_len // size), device=device
        )
        self._begun: _Begun | None = None
        self._drawn: _Drawn | None = None
        self._graphs: DecodeGraphs | None = None
        self._single: SingleTokens | None = None
        self._tile_graphs: TileGraphs | None = None
        self._make_vision(settings)

    def _make_vision(self, settings: EngineSettings) -> None:
        chunk, graphs = settings.encoder_chunk_tiles, self._tile_graphs
        outputs = NoOutputs if self._group.stage else EncoderOutputs
        self._vision = outputs(self._model, chunk, graphs)

    def _capturer(self, settings: EngineSettings) -> Capture | None:
        """A new one each time: memory that graphs shared is not shared again when they are gone."""
        return capture_on(self._model.device) if settings.cuda_graphs else None

    def _capture(self, settings: EngineSettings, *, largest: bool = False) -> None:
        """Make the graphs, or the largest ones alone. Where one cannot be, go on without: but raise
        RuntimeError if there are other ranks, which may have theirs and would compute more rows.
        """
        if (capture := self._capturer(settings)) is None:
            tables, last = self._device_rows.tables, self._device_rows.last
            self._single = single_tokens(self._model, self._kv, self._attention, tables, last)
            return
        rows = row_sizes(max_draws(settings, self._model.device.type))
        tiles = tile_sizes(self._vision.chunk)
        if largest:
            rows, tiles = rows[-1:], tiles[-1:]
        try:
            with torch.inference_mode():
                if self._group.stage == 0:
                    self._tile_graphs = TileGraphs(self._model, tiles, capture)
                # Stages wait for each other, and some mixtures to know which experts are chosen.
                mixed = self._model.config.text.experts is not None
                waits = (mixed and self._model.ops.experts_wait) or self._group.stages > 1
                if self._attention.graph_safe and not waits:
                    self._graphs = DecodeGraphs(
                        self._model, self._kv, self._attention, self._device_rows, rows, capture
                    )
        except RuntimeError as error:
            if not self._group.is_alone:
                raise RuntimeError("no CUDA graphs (--cuda-graphs false goes without)") from error
            self._graphs = self._tile_graphs = None
            logger.warning("no graphs: %s", (str(error) or repr(error)).splitlines()[0])
            return
        made = tiles if self._tile_graphs else "none", rows if self._graphs else "none"
        logger.info("graphs tiles=%s rows=%s", *made)

    def _profile(self, settings: EngineSettings, max_model_len: int) -> int:
        """Bytes that the largest step takes beside weights and caches."""
        config = self._model.config
        request, buffers, plan = largest_step(
            settings, config.geometry, max_model_len, config.vocab_size, self._device
        )
        names = [work.id for work in plan.work]
        digests = [item.digest for item in plan.encode]
        with shallow(self._model):
            self._allocate(settings, len(plan.new_rows[0].blocks), max_model_len)
            self._kv.clear(plan.new_rows[0].blocks)
            self.upload(request, buffers)

            def run() -> None:
                for step in (plan, StepPlan(1, [], [], [], digests, names)):
                    self.begin(step)
                    self.sample()
                    self.finish()

            def capture() -> None:
                self._capture(settings, largest=True)
                self._graphs = self._tile_graphs = None
                gc.collect()  # they are parts of cycles

            taken = measure(self._model.device, run)
            if self._capturer(settings) is not None:
                # Graphs keep what they take, while other steps run.
                taken += measure(self._model.device, capture)
        del self._kv  # or it would count as used when the real one is sized
        return taken

    def _warm_up(self, settings: EngineSettings) -> None:
        """Compute a picture and two tokens.

        What is set up at first use then costs no request anything, and a device that cannot
        compute fails the start: an engine that says it is ready has been seen to work.
        """
        geometry = self._ready.geometry
        length = geometry.tokens_per_tile
        if length + 2 > self._ready.max_model_len:
            length = 0
        items = [VisionItem(b"warm-up", 0, length, 1, 0)] if length else []
        request = EngineRequest("warm-up", [0] * (length + 1), SamplingParams(max_tokens=2), items)
        core = EngineCore(settings, self, self._ready)
        core.add(request, [bytes(geometry.tile_bytes)] * len(items))
        while (report := core.step()) is not None:
            for output in report.outputs:
                if output.finish_reason == "error":
                    raise RuntimeError(f"the warm-up failed: {output.error}")

    def ready(self) -> Ready:
        """The facts of the model and of the memory it got."""
        return self._ready

    def prepare(self, request: EngineRequest) -> Future[Any] | None:
        """Begin to compile a request's grammar; None if there is nothing to wait for."""
        grammar = request.sampling.grammar
        return self._grammars.prepare(grammar) if self._grammars and grammar else None

    def cost(self) -> CostModel | None:
        """What steps were seen to cost at the start; None: their time is not bounded."""
        return self._cost

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        """Keep the raw tiles of a request until a plan removes it."""
        self._vision.upload(request, buffers)

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> None:
        """Apply a plan, in the order that StepPlan states, and launch its forward pass."""
        began = moment(self._device)
        self._forget(plan)
        for new in plan.new_rows:
            matcher = self._grammars.matcher(new.sampling) if self._grammars else None
            self._rows.add(new, matcher)
        encoding = self._vision.encode(plan.encode)
        self._begun = self._compute(plan) if plan.work else _Begun(plan.step, [])
        self._begun.began, self._begun.encoding = began, encoding

    def sample(self) -> None:
        """Launch the draw of the step begun; the step before it is finished."""
        assert self._begun is not None, "nothing was begun"
        assert self._drawn is None, "the step before is not finished"
        begun, self._begun = self._begun, None
        tokens, likely = begun.tokens, None
        if begun.names and not len(tokens):
            tokens, likely = self._draw(begun)
        # Copied now, behind the draw: a copy asked for later would stand behind the next step.
        tokens, likely = to_host(tokens), likely and likely.to_host()
        scored = begun.scored and begun.scored.to_host()
        ended = moment(self._device)
        on_device = self._device_rows.last.is_cuda
        arrived = torch.cuda.current_stream().record_event() if on_device else None
        self._drawn = _Drawn(
            begun.step, begun.began, ended, begun.names, tokens, likely, scored, begun.encoding,
            arrived,
        )  # fmt: skip

    @torch.inference_mode()
    def _draw(self, begun: _Begun) -> tuple[Tensor, Likely | None]:
        """The next tokens [R] of the step's rows, and their logprobs if any asks."""
        names, logits, likely = begun.names, begun.logits, None
        if logits is None or not self._draws:
            tokens = self._group.broadcast(self._device_rows.last.new_empty(len(names)))
            self._device_rows.note(self._rows.lines(names), tokens)
            return tokens, None
        if begun.graph is not None and self._rows.are_plain(names):
            rows = self._rows.sample_rows(names)
            tokens = begun.graph.sample(draws(rows, begun.graph.size))[: len(rows)]
            return self._group.broadcast(tokens), None
        if begun.graph is not None:
            logits = logits[: len(names)]
        if self._rows.are_greedy(names):
            tokens = sample_plain(logits)
        else:
            rows = self._rows.sample_rows(names)
            tokens = sample(logits, rows)
            likely = logprobs(logits, tokens, rows)
        self._device_rows.note(self._rows.lines(names), tokens)
        return self._group.broadcast(tokens), likely

    def finish(self) -> StepResult:
        """Wait for the tokens of the step that was sampled; rows that live get theirs."""
        assert self._drawn is not None, "nothing was sampled"
        drawn, self._drawn = self._drawn, None
        if drawn.arrived is not None:
            drawn.arrived.synchronize()
        rows, sampled, done = len(drawn.names), [], None
        likely = drawn.likely.read(rows) if drawn.likely else [None] * rows
        tokens = sound(drawn.names, drawn.tokens.tolist())
        for name, token, entry in zip(drawn.names, tokens, likely, strict=True):
            if name == done:
                continue  # behind a speculated token that was wrong
            if token < 0:
                sampled.append(self._none_drawn(name, token))
            else:
                sampled.append(Sampled(name, token, logprobs=entry))
            done = None if token >= 0 and self._rows.append_token(name, token) else name
        scored = drawn.scored.read() if drawn.scored else []
        encode_seconds = drawn.encoding.seconds() if drawn.encoding else []
        seconds = seconds_between(drawn.began, drawn.ended)
        return StepResult(drawn.step, sampled, scored, encode_seconds, seconds)

    def _forget(self, plan: StepPlan) -> None:
        for name in plan.removed:
            self._rows.remove(name)
            self._vision.forget(name)
        for name in plan.preempted:
            self._rows.remove(name)
        for digest in plan.drop:
            self._vision.drop(digest)

    def _lengthen(self, plan: StepPlan) -> None:
        """Blocks and rows as the plan's work needs them."""
        for copy in plan.copies:
            self._kv.copy(copy.source, copy.target)
        kept = {copy.target for copy in plan.copies}
        if fresh := [block for work in plan.work for block in work.new_blocks if block not in kept]:
            self._kv.clear(fresh)
        for work in plan.work:
            if work.new_blocks:
                self._rows.append_blocks(work.id, work.new_blocks)
            if work.speculated:
                self._rows.speculate(work.id, work.speculated)
        self._device_rows.update(self._rows.appended())

    def _compute(self, plan: StepPlan) -> _Begun:
        """The logits of the rows to draw for, and what is looked up of prompts."""
        self._lengthen(plan)
        if (begun := self._compute_single(plan)) is not None:
            return begun
        batch = self._rows.batch(plan.work)
        names, last = [], list[int]()
        for work, start in zip(plan.work, batch.starts, strict=True):
            if work.sample:
                end, places = start + work.count, 1 + len(work.speculated)
                names.extend([work.id] * places)
                last.extend(range(end - places, end))
        scores = any(work.score for work in plan.work)
        embeddings, scored, some = self._embed(plan, batch), None, None
        if len(last) < len(embeddings):
            some = to_device(last, embeddings.device, torch.int64)
        wanted = None if scores else some
        hidden = self._model(
            embeddings, batch.positions, batch.attention, self._kv, self._attention, wanted
        )
        if self._group.stage:
            return _Begun(plan.step, names)
        if scores:
            scored = self._score(
                [
                    (work, hidden[start : start + work.count])
                    for work, start in zip(plan.work, batch.starts, strict=True)
                    if work.score
                ]
            )
            hidden = hidden if some is None else hidden[some]
        tokens = self._model.draw(hidden) if last and self._rows.are_greedy(names) else None
        if tokens is not None:
            self._device_rows.note(self._rows.lines(names), tokens)
            return _Begun(plan.step, names, scored=scored, tokens=tokens)
        logits = self._model.logits(hidden) if last else None
        return _Begun(plan.step, names, logits, scored)

    def _compute_single(self, plan: StepPlan) -> _Begun | None:
        """The same in one call, where there is one for it: behind each token of it one is drawn."""
        if not self._rows.are_single(plan.work):
            return None
        names = [work.id for work in plan.work for _ in range(work.count)]
        one = self._graphs.pick(len(names)) if self._graphs else self._single
        if one is None:
            return None
        if isinstance(one, DecodeGraph):
            padded = one.forward(self._rows.decode_inputs(plan.work, one.size))
            return _Begun(plan.step, names, padded, graph=one)
        inputs = self._rows.decode_inputs(plan.work, len(names))
        if self._rows.are_greedy(names):
            return _Begun(plan.step, names, tokens=one.draw(inputs))
        return _Begun(plan.step, names, self._model.logits(one.hidden(inputs)))

    def _score(self, scoring: Sequence[tuple[Work, Tensor]]) -> Scored | None:
        """Look up the prompts' tokens; each work comes with its hidden states."""
        parts, rows, tokens = [], [], []
        for work, hidden in scoring:
            part, following, hidden = asked(self._rows.sample_row(work.id), work.start, hidden)
            parts.append(part)
            rows.append(hidden)
            tokens.append(following)
        hidden, at_once = torch.cat(rows), self._score_at_once
        if not self._draws:
            for some in hidden.split(at_once):
                self._model.logits(some)
            return None
        found = to_device(np.concatenate(tokens), hidden.device)
        return score(self._model.logits, hidden, found, parts, at_once)

    def _embed(self, plan: StepPlan, batch: StepBatch) -> Tensor:
        ids = batch.ids
        if batch.unknown is not None:
            where, lines = batch.unknown
            ids = ids.index_copy(0, where, self._device_rows.last[lines])
        embeddings = self._model.embed(ids)
        for work, at in zip(plan.work, batch.starts, strict=True):
            row = self._rows[work.id]
            if work.start < row.vision_end:
                self._vision.place(embeddings, row.spans, work.start, at, work.count)
        return embeddings

    def _none_drawn(self, name: str, reason: int) -> Sampled:
        matcher = self._rows.matcher(name)
        if matcher is not None and matcher.error:
            return Sampled(name, 0, matcher.error, stuck=True)
        stuck = reason == NOTHING_LEFT
        return Sampled(name, 0, None if stuck else _NOT_FINITE, stuck=stuck)


def _reporter(progress: Callable[[Progress], None]) -> Callable[[int, int], None]:
    """Pass on loaded bytes, a hundred times at most."""
    passed = -1

    def report(done: int, total: int) -> None:
        nonlocal passed
        percent = 100 * done // total
        if percent != passed:
            passed = percent
            progress(Progress("weights", done, total))

    return report
