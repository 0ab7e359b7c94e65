"""What lives as long as the server: engine, media, model, metrics, and the state they are in
together: starting, ready, draining or failed. Routes ask it; only the app and the process that
runs it change it."""

import asyncio
import contextlib
import logging
import platform
import time
from collections.abc import AsyncIterator
from pathlib import Path

from engine.client import EngineClient
from preprocessing.budget import Budget, Share
from server.admission import Gate
from server.backlog import Backlog
from server.chat.critic import Critic
from server.chat.prepare import ServedModel
from server.chat.recording import Recordings
from server.chat.showing import Media
from server.dialects.background import Background
from server.dialects.store import ResponseStore
from server.files import FileStore
from server.grammars import GrammarChecker
from server.handles import Handles
from server.keys import Keys
from server.limits import Clock
from server.metric_table import STATES
from server.metrics import Metrics
from server.version import installed_version
from wire.errors import Code, InvalidRequest, ServiceError, TooManyRequests, Unavailable
from wire.messages import Progress
from wire.settings import Settings

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.5
RETRY_AFTER = 5
TILE_TIMEOUT = 30.0
TOO_MANY_PICTURES: Code = "too_many_pictures"


class Service:
    """Raises SettingError where the file of keys cannot be used.

    Starts with ``start``, which returns at once; ``settled`` is set when the model is ready or
    cannot be, ``failed`` when the server can never serve (again); ``stop`` ends everything."""

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        media: Media,
        clock: Clock = time.monotonic,
        critic: EngineClient | None = None,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.critic = None if critic is None else Critic(critic, settings.critic)
        self.media = media
        self.handles = Handles(engine)
        self.grammars = GrammarChecker()
        self.keys = Keys.of(settings.server, clock)
        self.metrics = Metrics(engine, lambda: media.stats, self.keys, critic)
        fair = settings.engine.scheduling_policy == "fair"
        self.gate = Gate(settings.server.max_concurrent_requests, self.metrics, fair=fair)
        self.backlog = Backlog(settings.server, self.metrics, fair=fair)
        self.recordings = Recordings(settings.server, self.gate, self.metrics)
        self.responses = ResponseStore(
            settings.server.response_store_bytes, settings.server.response_store_ttl
        )
        self.background = Background()
        self.files = FileStore(
            settings.server.file_store_bytes,
            settings.server.file_ttl,
            self.metrics.files_evicted.add,
        )
        self._tiles = Budget(settings.engine.request_tile_bytes)
        self.name = settings.server.served_model_name or Path(settings.engine.model).name
        self.model: ServedModel | None = None
        self.settled = asyncio.Event()
        self.failed = asyncio.Event()
        self._draining = False
        self._paused = False
        self._preparing: set[asyncio.Timeout] = set()
        self._created = int(time.time())
        self._task: asyncio.Task[None] | None = None
        self._lag: asyncio.Task[None] | None = None
        self.metrics.show(
            internvl_requests_in_flight=lambda: self.gate.running,
            internvl_request_tile_bytes=lambda: self._tiles.used,
            internvl_response_store_bytes=lambda: self.responses.used,
            internvl_files=lambda: self.files.count,
            internvl_file_store_bytes=lambda: self.files.used,
            internvl_state=lambda: {state: self.state == state for state in STATES},
            internvl_build_info=self._build,
            internvl_cache_config_info=self._config,
        )

    def _build(self) -> dict[str, str]:
        python = platform.python_version()
        return {"version": installed_version(), "model": self.name, "python": python}

    def _config(self) -> dict[str, str] | None:
        ready = self.engine.ready
        if ready is None:
            return None
        return {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.blocks_total),
            "enable_prefix_caching": str(self.settings.engine.enable_prefix_caching).lower(),
            "device": ready.device,
            "dtype": ready.dtype,
            "attention": ready.attention,
            "max_model_len": str(ready.max_model_len),
        }

    async def start(self) -> None:
        """Begin to load; returns at once, so that the port can open."""
        self._lag = asyncio.create_task(self.metrics.watch_loop(), name="lag")
        await self.engine.start()
        self._task = asyncio.create_task(self._live(), name="service")

    async def _live(self) -> None:
        try:
            while True:
                ready = await self.engine.wait_ready()  # raises when the engine is lost for good
                if self.model is None or self.model.ready != ready:
                    await self.media.start(ready.geometry)
                    if self.critic is not None and self.model is None:
                        await self.critic.start()  # now that it is known what the first one leaves
                    self.model = await asyncio.to_thread(
                        ServedModel.load, self.name, self._created, ready, self.settings
                    )
                    self.settled.set()
                self.responses.expire()
                self.files.expire()
                await asyncio.sleep(WATCH_INTERVAL)
        except Unavailable as error:
            if self._draining:
                return
            logger.error("%s", error)  # the engine has logged why
        except Exception as error:
            logger.error("the server cannot start: %s", error)
            logger.debug("reason", exc_info=True)
        self.failed.set()
        self.settled.set()

    @property
    def state(self) -> str:
        """One of "starting", "ready", "draining" (whether to end or not), "failed"."""
        if self.failed.is_set():
            return "failed"
        if self._draining or self._paused:
            return "draining"
        # A successor of an engine that died may have less room: its facts count, or none.
        known = self.model is not None and self.model.ready == self.engine.ready
        return "ready" if known and self.engine.state == "ready" else "starting"

    @property
    def started(self) -> bool:
        """Whether the model has been loaded; stays true, whatever becomes of it."""
        return self.model is not None

    @property
    def progress(self) -> Progress | None:
        """Of the engine that is being loaded."""
        loaded = self.engine.state == "ready" and self.model is None
        return self.critic.engine.progress if loaded and self.critic else self.engine.progress

    @property
    def reason(self) -> str:
        """Why the state is not "ready", for clients and probes."""
        if self.state == "starting":
            return "loading the model" if self.model is None else "the engine is starting again"
        if self.state == "draining":
            return "the server is shutting down" if self._draining else "an operator drains it"
        return "the engine failed"

    def refusal(self) -> ServiceError | None:
        """Why no new work is taken now, or None."""
        if self.state == "ready":
            return None
        return Unavailable(f"The server is not ready: {self.reason}.", retry_after=RETRY_AFTER)

    def served(self) -> ServedModel:
        """The model; raises Unavailable before it is loaded."""
        if self.model is None:
            raise self.refusal() or Unavailable("The server is not ready.")
        return self.model

    async def tile_room(
        self, held: contextlib.AsyncExitStack, size: int, *, beside: int = 0
    ) -> Share:
        """Wait until ``size`` more bytes of tiles may be kept, and enter them into ``held``; who
        has so many ``beside`` does not wait. Raises TooManyRequests, and InvalidRequest where both
        are more than all may have.

        They are kept until the answer ends, because a new engine would need them.
        """
        if beside and beside + size > self._tiles.total:
            raise InvalidRequest(
                f"messages: the pictures take {beside} bytes as tiles, and for the critic of "
                f"best_of up to {size} more; {self._tiles.total} are allowed together "
                "(--request-tile-bytes). Show fewer of them, or smaller with max_tiles, or use "
                "another critic.",
                param="messages",
            )
        patience = 0 if beside else TILE_TIMEOUT
        try:
            return await held.enter_async_context(self._tiles.share(size, patience))
        except TimeoutError:
            self.metrics.refused.add(TOO_MANY_PICTURES)
            raise TooManyRequests(
                "The pictures of other requests take all the memory there is for them; try again "
                "later.",
                param="messages",
                code=TOO_MANY_PICTURES,
                retry_after=RETRY_AFTER,
            ) from None

    @contextlib.asynccontextmanager
    async def preparing(self) -> AsyncIterator[None]:
        """Work for a request that the engine has not heard of. Raises Unavailable, wherever it is
        waiting, when the time to finish is over."""
        limit = asyncio.timeout(None)
        self._preparing.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._ended() from None
        finally:
            self._preparing.discard(limit)

    def _ended(self) -> Unavailable:
        if self._draining:
            return Unavailable("The server is shutting down.", retry_after=RETRY_AFTER)
        return Unavailable("An operator has ended this request.", code="aborted_by_operator")

    def pause(self) -> None:
        """Take no new work until ``resume``; what is running goes on."""
        self._paused = True

    def resume(self) -> None:
        """Take work again."""
        self._paused = False

    def abort_all(self) -> int:
        """End all requests, each with an error of its own; how many were preparing or running. One
        with several choices counts for each."""
        return self._end_preparing() + self.engine.abort_all(self._ended)

    def _end_preparing(self) -> int:
        # One that has been told already may still be tidying up.
        told = [limit for limit in self._preparing if not limit.expired()]
        for limit in told:
            limit.reschedule(0)
        return len(told)

    def flush(self) -> None:
        """Forget tiles, encoded pictures and prefixes of earlier requests. What clients have given
        to be kept, responses and files, is no cache."""
        self.media.forget()
        for engine in self.engines:
            engine.flush()

    @property
    def engines(self) -> list[EngineClient]:
        """All that there are."""
        return [self.engine, *([self.critic.engine] if self.critic else ())]

    async def drain(self) -> None:
        """Take no new work; return when the running work is done or its time is over."""
        self._draining = True
        try:
            await asyncio.wait_for(self.gate.idle.wait(), self.settings.server.drain_timeout)
        except TimeoutError:
            logger.warning("the time to finish is over; ending what still runs")
            # Each request gets an error of its own, not a cut stream.
            self.abort_all()
            await self.engine.stop()

    async def stop(self) -> None:
        """End engine, media and the worker for grammars."""
        self._draining = True
        tasks = [task for task in (self._task, self._lag) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.recordings.close()
        for engine in self.engines:
            await engine.stop()
        await self.media.close()
        await self.grammars.close()
