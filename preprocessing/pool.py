"""The asyncio side of the decode workers: spawn, dispatch, time out, kill, replace.

Owned by the media pipeline. A worker has one job at a time; whoever waits is served in order, and
of several workers one is left to pictures, which take a moment where a video may take a minute.
A worker that dies or overruns is replaced. A job whose worker died is tried once more with
another one, for the picture may be innocent; an overrun costs the job. However many die, the
pictures of others are only as late as it takes to start a successor. What a worker sends is checked
as if it came from outside.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from preprocessing.grid import choose_grid, tile_count
from preprocessing.media import (
    NOUNS,
    Answer,
    Confine,
    Confined,
    Facts,
    FrameChoice,
    Frames,
    FramesJob,
    FromWorker,
    Job,
    Kind,
    LookJob,
    PictureFacts,
    Refused,
    Tiled,
    TileJob,
    TileSettings,
    Treatment,
    VideoFacts,
    refusal,
    too_many,
)
from wire.channel import AsyncChannel, Bounds, ChannelClosed
from wire.errors import MediaRefused, Unavailable
from wire.settings import MediaSettings

T = TypeVar("T")

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
QUEUE_TIMEOUT = 60.0
ABANDONED = 2.0  # seconds that a job goes on for which nobody waits any more
PAUSE = 5.0  # seconds between attempts to start a worker that does not start
# Decoded, turned and composited, Pillow holds at most this many bytes of one pixel.
BYTES_PER_PIXEL = 16
SPARE_MEMORY = 256 << 20
SLACK, FRAME_SLACK = 4096, 256  # bytes of a reply that are not tiles, and those of each frame

_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HOME", "SYSTEMROOT", "LANG")


def child_environment() -> dict[str, str]:
    """The variables of a child that handles what clients send: it runs the code that we do, and
    knows none of our keys."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        # A heap of its own would cost a thread 64 MiB of the address space that it may use.
        "MALLOC_ARENA_MAX": "1",
    }


KILLS = ("timeout", "processor_time", "seccomp", "killed", "crash", "exit", "answer", "abandoned")
"""Why a worker ended before its time. We ended it: it took too long, gave an answer that no honest
worker gives, or nobody waited for its job any more. The system did: for its processor time, a
system call, by SIGKILL (for want of memory, perhaps) or by another signal. Or it left."""

# Not every number of a signal has a name.
_SIGNALS: dict[int, str] = {
    signal.SIGXCPU: "processor_time",
    signal.SIGSYS: "seccomp",
    signal.SIGKILL: "killed",
}
# Seconds in which a worker that has closed its socket must have ended.
_LEAVING = 1.0


@dataclasses.dataclass
class MediaStats:
    """Counters since the start, ``busy`` apart. ``kills`` are by why; see ``KILLS``."""

    decoded: int = 0
    refused: int = 0
    replaced: int = 0
    busy: int = 0
    kills: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KILLS, 0))
    tile_queries: int = 0
    tile_hits: int = 0


class _WorkerDied(Exception):
    """A job ended with its worker."""


class _Worker:
    """One child and its channel; ``channel`` is None until ``ready`` returned."""

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "preprocessing.worker", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=child_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._channel: AsyncChannel[FromWorker] | None = None

    async def ready(self) -> list[str]:
        """Wait until the worker has confined itself; the names of the layers it lacks."""
        settings = self._settings
        self._channel = await AsyncChannel.open(self._socket, FromWorker, SLACK)
        limits = Confine(
            memory=BYTES_PER_PIXEL * settings.max_image_pixels
            + 4 * settings.max_media_bytes
            + settings.max_video_bytes
            + SPARE_MEMORY,
            video_reader=settings.video_reader,
        )
        async with asyncio.timeout(START_TIMEOUT):
            await self._channel.send(limits)
            answer, _ = await self._channel.receive()
        if not isinstance(answer, Confined):
            raise ChannelClosed("a worker did not confine itself")
        return answer.missing

    async def run(self, job: Job, encoded: bytes, within: float) -> tuple[Answer, list[bytes]]:
        """One job in ``within`` seconds; its answer and buffers. Raises ChannelClosed,
        TimeoutError."""
        if self._channel is None:
            raise ChannelClosed("a worker is not ready")
        async with asyncio.timeout(within):
            await self._channel.send(job, [encoded])
            answer, buffers = await self._channel.receive(_most(job))
        if isinstance(answer, Confined):
            raise ChannelClosed("a worker sent an answer to another question")
        _check(answer, buffers, job)
        return answer, buffers

    async def cause(self) -> str:
        """Why it ended by itself, one of ``KILLS``."""
        try:
            status = await asyncio.to_thread(self.process.wait, _LEAVING)
        except subprocess.TimeoutExpired:
            return "answer"  # it has only said that it is gone
        return "exit" if status >= 0 else _SIGNALS.get(-status, "crash")

    async def end(self) -> None:
        """Kill the child and reap it. Idempotent."""
        if self._channel is None:
            self._socket.close()
        else:
            self._channel.close()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


def _most(job: Job) -> Bounds:
    """The largest answer to a job. What a message lists takes far more memory than its bytes."""
    if isinstance(job, LookJob):
        return Bounds(SLACK, 0, SLACK)
    shown = 1 if isinstance(job, TileJob) else job.choice.most
    message = SLACK + shown * FRAME_SLACK
    return Bounds(message, shown, message + shown * (job.settings.most_bytes + FRAME_SLACK))


def _check(answer: Answer, buffers: Sequence[bytes], job: Job) -> None:
    """Raise ChannelClosed for an answer that no honest worker sends."""
    honest = False
    if isinstance(answer, Refused):
        honest = not buffers
    elif isinstance(job, LookJob):
        wanted = PictureFacts if job.kind == "image" else VideoFacts
        honest = isinstance(answer, wanted) and not buffers and _plausible(answer, job)
    elif isinstance(job, TileJob):
        honest = isinstance(answer, Tiled) and len(buffers) == 1 and _fits(answer, buffers[0], job)
    elif isinstance(answer, Frames):
        shown = len(answer.tiles)
        honest = (
            1 <= shown <= job.choice.most
            and shown == len(buffers) == len(answer.indices) == len(answer.seconds)
            and all(_fits(*pair, job) for pair in zip(answer.tiles, buffers, strict=True))
            and answer.indices == sorted(set(answer.indices))
            and answer.indices[-1] < answer.facts.frames <= job.max_frames
            and _plausible(answer.facts, job)
        )
    if not honest:
        raise ChannelClosed("a worker sent an answer that does not fit the question")


def _plausible(size: Facts | Tiled, job: Job) -> bool:
    return size.width * size.height <= job.max_pixels


def _fits(answer: Tiled, tiles: bytes, job: TileJob | FramesJob) -> bool:
    settings = job.settings
    return (
        _plausible(answer, job)
        and (answer.columns, answer.rows)
        == choose_grid(
            answer.width, answer.height, settings.side, settings.min_tiles, settings.max_tiles
        )
        and answer.count == tile_count(answer.width, answer.height, settings)
        and len(tiles) == answer.count * 3 * settings.side * settings.side
    )


class DecodePool:
    """``settings.decode_workers`` children, at most one job each."""

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._workers: set[_Worker] = set()
        self._idle: asyncio.Queue[_Worker | None] = asyncio.Queue()  # None: the pool has closed
        self._videos = asyncio.Semaphore(max(1, settings.decode_workers - 1))
        self._waiting = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open = False
        self.stats = MediaStats()
        self.missing: list[str] = []  # layers of the sandbox that this system lacks

    @property
    def pids(self) -> list[int]:
        """Process ids of the children."""
        return [worker.process.pid for worker in self._workers]

    async def start(self) -> None:
        """Start the children and wait for them.

        Raises Unavailable when a child does not start, or lacks a layer of its sandbox and
        ``require_sandbox`` is set.
        """
        self._open = True
        outcomes = await asyncio.gather(
            *(self._hire() for _ in range(self._settings.decode_workers)), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                await self.close()
                if isinstance(outcome, Unavailable):
                    raise outcome
                raise Unavailable("The picture decoder cannot be started.") from outcome
        if self.missing:
            log.warning("decode workers lack sandbox layers=%s", ",".join(self.missing))

    async def close(self) -> None:
        """End every child and whatever waits for one. Idempotent."""
        self._open = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()
        for _ in range(self._waiting):
            self._idle.put_nowait(None)
        self._idle = asyncio.Queue()

    async def look(self, encoded: bytes, kind: Kind, treatment: Treatment, param: str) -> Facts:
        """What the header says. Raises MediaRefused naming ``param``, or Unavailable."""
        settings = self._settings
        job = LookJob(
            kind=kind,
            treatment=treatment,
            max_pixels=settings.max_image_pixels,
            max_frames=settings.max_source_frames,
            seconds=self._processor_time(kind),
        )
        answer, _ = await self._run(job, encoded, kind, param)
        return cast(Facts, answer)

    async def tile(self, encoded: bytes, settings: TileSettings, param: str) -> tuple[Tiled, bytes]:
        """Decode and tile one picture. Raises MediaRefused naming ``param``, or Unavailable."""
        job = TileJob(
            settings=settings,
            max_pixels=self._settings.max_image_pixels,
            seconds=self._processor_time("image"),
        )
        answer, buffers = await self._run(job, encoded, "image", param)
        return cast(Tiled, answer), buffers[0]

    async def frames(
        self, encoded: bytes, settings: TileSettings, choice: FrameChoice, param: str
    ) -> tuple[Frames, list[bytes]]:
        """Decode and tile frames of a video. Raises MediaRefused naming ``param``, or
        Unavailable."""
        job = FramesJob(
            settings=settings,
            choice=choice,
            max_pixels=self._settings.max_image_pixels,
            max_frames=self._settings.max_source_frames,
            reader=self._settings.video_reader,
            seconds=self._processor_time("video"),
        )
        answer, buffers = await self._run(job, encoded, "video", param)
        return cast(Frames, answer), buffers

    def _timeout(self, kind: Kind) -> float:
        return self._settings.media_timeout if kind == "image" else self._settings.video_timeout

    def _processor_time(self, kind: Kind) -> int:
        """Seconds, a little more than the deadline: a worker that is killed late ends itself."""
        return int(self._timeout(kind)) + 1

    async def _run(
        self, job: Job, encoded: bytes, kind: Kind, param: str
    ) -> tuple[Answer, list[bytes]]:
        """Have a worker do a job; its answer is no refusal and fits the job."""
        for _ in range(2):
            worker = await self._next(kind, param)
            # A task of its own: when the caller leaves, the worker still comes back to the others.
            task = self._spawn(self._serve(worker, job, encoded, kind, param))
            if kind == "video":
                task.add_done_callback(lambda _: self._videos.release())
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_later(ABANDONED, task.cancel)
                raise
            if task.cancelled():
                raise Unavailable("The server is stopping.", param=param)
            try:
                with contextlib.suppress(_WorkerDied):
                    return task.result()
            finally:
                # A task keeps its error, whose frames keep the task, and the picture.
                del task
        raise MediaRefused(f"{NOUNS[kind]} could not be decoded.", param=param)

    async def _next(self, kind: Kind, param: str) -> _Worker:
        """A worker and, for a video, one of the places that videos have."""
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT):
                if kind == "image":
                    return await self._next_idle(param)
                await self._videos.acquire()
                try:
                    return await self._next_idle(param)
                except BaseException:
                    self._videos.release()
                    raise
        except TimeoutError:
            raise too_many(param) from None

    async def _next_idle(self, param: str) -> _Worker:
        self._waiting += 1
        try:
            while True:
                self._check_open(param)
                worker = await self._idle.get()
                if worker is None or not self._open:
                    continue
                if worker.process.poll() is None:
                    return worker
                self._died(worker, "while idle")
        finally:
            self._waiting -= 1

    def _check_open(self, param: str) -> None:
        if not self._open:
            raise Unavailable("The picture decoder is not running.", param=param, retry_after=5)

    async def _serve(
        self, worker: _Worker, job: Job, encoded: bytes, kind: Kind, param: str
    ) -> tuple[Answer, list[bytes]]:
        self.stats.busy += 1
        try:
            answer, buffers = await worker.run(job, encoded, self._timeout(kind))
        except TimeoutError:
            log.warning("decode worker overran pid=%d", worker.process.pid)
            self._replace(worker, "timeout")
            raise MediaRefused(
                f"{NOUNS[kind]} takes too long to decode.", param=param, code="media_timeout"
            ) from None
        except ChannelClosed as error:
            # Where the channel has no other error as its reason, it is what was said.
            self._died(worker, str(error), None if error.__cause__ else "answer")
            raise _WorkerDied from None
        except asyncio.CancelledError:
            if self._open:
                self._replace(worker, "abandoned")
            raise
        except Exception:
            log.exception("unexpected error in a decode job; its worker is replaced")
            self._replace(worker, "abandoned")
            raise
        finally:
            self.stats.busy -= 1
        self._idle.put_nowait(worker)
        if isinstance(answer, Refused):
            self.stats.refused += 1
            raise refusal(answer.reason, kind, param)
        if not isinstance(job, LookJob):
            self.stats.decoded += 1
        return answer, buffers

    def _died(self, worker: _Worker, how: str, why: str | None = None) -> None:
        log.warning("decode worker died pid=%d: %s", worker.process.pid, how)
        self._replace(worker, why)

    def _replace(self, worker: _Worker, why: str | None) -> None:
        """End a worker because of ``why``; None: it has ended by itself."""
        self.stats.replaced += 1
        self._spawn(self._bury(worker, why))
        # For nobody's request: what it logs, it may log for long.
        self._spawn(self._hire_again(), contextvars.Context())

    async def _bury(self, worker: _Worker, why: str | None) -> None:
        self.stats.kills[why or await worker.cause()] += 1
        await self._retire(worker)

    async def _retire(self, worker: _Worker) -> None:
        await worker.end()
        self._workers.discard(worker)

    async def _hire(self) -> None:
        worker = _Worker(self._settings)
        self._workers.add(worker)
        try:
            self.missing = await worker.ready()
            if self.missing and self._settings.require_sandbox:
                lacking = ", ".join(self.missing)
                raise Unavailable(
                    f"require_sandbox is set, and this system lacks sandbox layers: {lacking}"
                )
        except BaseException:
            await self._retire(worker)
            raise
        self._idle.put_nowait(worker)

    async def _hire_again(self) -> None:
        """Try until it succeeds, so that the pool does not stay smaller than it should be."""
        while True:
            try:
                await self._hire()
                return
            except Exception as error:
                log.error("a decode worker cannot be started: %s", error)
                await asyncio.sleep(PAUSE)

    def _spawn(
        self, work: Coroutine[Any, Any, T], context: contextvars.Context | None = None
    ) -> asyncio.Task[T]:
        """Run in the background; the set keeps the task alive, ``close`` cancels it."""
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that left does not fetch it, and asyncio would complain
