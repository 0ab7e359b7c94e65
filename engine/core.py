"""The engine itself, without a process around it: requests in, one report per step out.

``engine.process`` drives it in the engine process, ``engine.inproc`` in tests and benchmarks;
both call it from one thread at a time. It joins the Scheduler, which decides, to a Runner, which
computes, and knows nothing of either's insides.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

import msgspec

from engine.cost import CostModel, Pace
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.sequence import Refused
from engine.speculation import are_known, max_speculated
from wire.channel import Buffer
from wire.errors import InvalidRequest
from wire.logs import about
from wire.messages import (
    Abort,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Fault,
    Flush,
    LogLevel,
    Progress,
    Ready,
    StepReport,
    ToEngine,
)
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

_MOMENT = 0.01  # seconds


class Runner(Protocol):
    """What the engine needs of ``engine.runner.ModelRunner``; tests have a fake one."""

    def ready(self) -> Ready:
        """The facts of the model and of the memory it got."""

    def prepare(self, request: EngineRequest) -> Future[object] | None:
        """Begin, in another thread, what a row of this request will need; None if nothing."""

    def cost(self) -> CostModel | None:
        """What steps were seen to cost at the start; None: it was not looked at."""

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        """Keep the raw tiles of a request until a plan removes it."""

    def begin(self, plan: StepPlan) -> None:
        """Apply a plan and launch its forward pass. A step that was sampled may be unfinished."""

    def sample(self) -> None:
        """Launch the draw of the step begun; the step before it is finished."""

    def finish(self) -> StepResult:
        """Wait for the tokens of the step that was sampled."""


MakeRunner = Callable[[EngineSettings, Callable[[Progress | Fault], None]], Runner]
"""Loads a model, reporting progress; ``ModelRunner`` itself is one. A Fault is the last word of a
process whose main thread may be unable to say it."""


_Preparing = tuple[Future[object], EngineRequest, Sequence[Buffer], float]


class EngineCore:
    """Add and abort requests, then ``step`` while there is work.

    With async scheduling a step stays under way when ``step`` returns: the next call plans and
    launches the one behind it before it waits for the tokens, so that the device never waits for
    the scheduler. Sampling comes after that wait: penalties and grammars know every token.
    """

    def __init__(self, settings: EngineSettings, runner: Runner, ready: Ready) -> None:
        self._runner = runner
        self._ready = ready
        self._scheduler = Scheduler(settings, ready)
        self._pace = Pace(runner.cost())
        mode, speculated = settings.async_scheduling, max_speculated(settings, ready.device)
        waits = speculated or ready.device.startswith("cpu")
        self._pipelined = mode == "on" or (mode == "auto" and not waits)
        self._flying: StepPlan | None = None  # sampled, not finished
        self._refused: list[EngineOutput] = []
        # Not the scheduler's yet: what their rows need is being prepared.
        self._preparing: dict[str, _Preparing] = {}
        self.suspects: list[str] = []
        """Requests being computed at this moment; an exception is likely due to one of them."""

    def take(self, message: ToEngine, buffers: Sequence[Buffer], came: float | None = None) -> None:
        """Do what a message from the front end says, which ``came`` at this ``time.monotonic``."""
        if isinstance(message, EngineRequest):
            self.add(message, buffers, came)
        elif isinstance(message, Abort):
            self.abort(message.ids)
        elif isinstance(message, Flush):
            self._scheduler.flush()
        elif isinstance(message, LogLevel):
            logging.getLogger().setLevel(message.level.upper())

    def add(
        self,
        request: EngineRequest,
        buffers: Sequence[Buffer] = (),
        came: float | None = None,
    ) -> None:
        """Take a request over. One that can never be computed ends with reason "error"."""
        came = time.monotonic() if came is None else came
        self.suspects = [request.id]
        with about(request.origin):
            logger.debug(
                "request=%s comes prompt=%d pictures=%d output=%d",
                request.id,
                len(request.prompt),
                len(request.items),
                len(request.output),
            )
        try:
            self._check(request, buffers)
            if request.id in self._preparing:
                raise Refused("a request with this id is still being handled")
            done = self._runner.prepare(request)
            if done is None:
                self._schedule(request, buffers, came)
            else:
                self._preparing[request.id] = done, request, buffers, came
        except Refused as refusal:
            self._refuse(request, refusal)

    def _schedule(self, request: EngineRequest, buffers: Sequence[Buffer], came: float) -> None:
        self._scheduler.add(request, came)
        if request.items:
            self._runner.upload(request, buffers)

    def _refuse(self, request: EngineRequest, refusal: Refused) -> None:
        with about(request.origin):
            logger.warning("request=%s refused: %s", request.id, refusal)
        self._refused.append(EngineOutput(request.id, [], "error", error=str(refusal)))

    def _schedule_prepared(self) -> None:
        """Hand over what is prepared; with nothing else to do, wait for it a moment.

        No longer, because requests that need nothing prepared, and aborts, may have come meanwhile.
        """
        if not (self._scheduler.has_work or self._flying or self._refused):
            futures = [done for done, *_ in self._preparing.values()]
            wait(futures, _MOMENT, return_when=FIRST_COMPLETED)
        for name, (done, request, buffers, came) in list(self._preparing.items()):
            if not done.done():
                continue
            del self._preparing[name]
            try:
                if (error := done.exception()) is not None:
                    logger.debug("request=%s cannot be prepared: %s", name, error)
                    raise Refused(f"it could not be prepared: {type(error).__name__}")
                self._schedule(request, buffers, came)
            except Refused as refusal:
                self._refuse(request, refusal)

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests; there will be no output for them. Unknown ids are ignored."""
        self._refused = [output for output in self._refused if output.id not in ids]
        for request_id in ids:
            if preparing := self._preparing.pop(request_id, None):
                preparing[0].cancel()
            self._scheduler.abort(request_id)

    def log_suspects(self) -> None:
        """Say of each request that was being computed that the engine fails."""
        for name in self.suspects:
            with about(self._scheduler.origin(name)):
                logger.error("request=%s was being computed when the engine failed", name)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        waiting = self._refused or self._flying or self._preparing
        return bool(waiting) or self._scheduler.has_work

    def step(self) -> StepReport | None:
        """Plan and compute one step; None if there was nothing to do."""
        if not self.has_work:
            return None
        if self._preparing:
            self._schedule_prepared()
        outputs, self._refused = self._refused, []
        self.suspects = [] if self._flying is None else self._flying.ids
        plan = self._scheduler.plan(self._pace.cost, time.monotonic())
        if plan is not None:
            self.suspects = list(dict.fromkeys([*self.suspects, *plan.ids]))
            self._runner.begin(plan)
        outputs += self._land()
        if plan is not None:
            self._runner.sample()
            self._flying = plan
            if not self._pipelined:
                outputs += self._land()
        self._scheduler.check_idle()
        return StepReport(outputs, self._stats())

    def _stats(self) -> EngineStats:
        stats = self._scheduler.stats
        return msgspec.structs.replace(
            stats,
            waiting=stats.waiting + len(self._preparing),
            step_seconds=self._pace.taken,
            predicted_seconds=self._pace.predicted,
        )

    def _land(self) -> list[EngineOutput]:
        """Finish and commit the step that is under way, if there is one."""
        if self._flying is None:
            return []
        result = self._runner.finish()
        self._pace.learn(self._flying, result)
        self._flying = None
        return self._scheduler.commit(result, time.monotonic())

    def _check(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        """Raise Refused where a request contradicts itself or the model.

        The front end has checked all this; one that got it wrong must not end the others.
        """
        try:
            request.sampling.check()
        except InvalidRequest as error:
            raise Refused(error.message) from None
        if request.sampling.grammar is not None and not self._ready.grammars:
            raise Refused("the checkpoint has no tokenizer that a grammar can use")
        named = [*request.sampling.named_tokens()]
        for ids in (request.prompt, request.output, named):
            if ids and not (min(ids) >= 0 and max(ids) < self._ready.vocab_size):
                raise Refused("the request names an id that the model does not know")
        if not are_known(request.prediction, self._ready.vocab_size):
            raise Refused("the prediction is not of tokens that the model knows")
        lookup = request.sampling.lookup
        if lookup is not None:
            ends = (-1, *lookup.at, len(request.prompt) - 1)
            if not lookup.ids or any(a >= b for a, b in itertools.pairwise(ends)):
                raise Refused("what is looked up in a prompt is not there")
        geometry = self._ready.geometry
        end = 0
        for item in request.items:
            if item.offset < end or item.length != item.tiles * geometry.tokens_per_tile:
                raise Refused("a picture's place in the prompt is wrong")
            if item.length == 0 or item.offset + item.length > len(request.prompt):
                raise Refused("a picture's place in the prompt is wrong")
            end = item.offset + item.length
            if not (
                0 <= item.buffer < len(buffers)
                and memoryview(buffers[item.buffer]).nbytes == item.tiles * geometry.tile_bytes
            ):
                raise Refused("a picture's tiles are missing")
