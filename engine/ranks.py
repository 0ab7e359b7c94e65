"""A model in several processes: what the engine's own, rank 0, does for the others.

Ranks are started here, or come from other hosts (``engine.door``). Each gets the same calls with
the same plans in the same order, and nothing else: the scheduler and the draws are here. A rank is
known to live by its socket. When one ends, this process ends at once, also where it waits for that
rank in a collective operation: the front end starts another engine, and requests go on. A rank ends
as soon as this process does. See ``engine.rank`` for the other side.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn

import msgspec

from engine.cost import CostModel
from engine.door import gather
from engine.network import LOOPBACK, listen, local_address, use_interface
from engine.orders import Begin, Finish, FromRank, Join, Loaded, Order, Sample, Upload
from engine.plan import StepPlan, StepResult
from engine.rank import load_part
from engine.trial import Trial
from wire.channel import Buffer, Channel, ChannelClosed, frame
from wire.digest import checkpoint_digest
from wire.logs import FORMAT_VARIABLE
from wire.messages import EngineRequest, Fault, LogLevel, Progress, Ready
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

Tell = Callable[[Progress | Fault], None]

_COMMAND = (sys.executable, "-P", "-m", "engine.rank")
# Bytes of what a rank says: progress, and why it fails.
_MOST = 1 << 16
# Seconds until which somebody has seen which rank died, when a collective operation fails of it.
_SOON = 0.5
# Seconds in which a rank that has closed its socket, or is killed, has ended.
_ENDING = 5.0


class Ranks:
    """Implements ``engine.core.Runner`` with rank 0's part of the model; every call that changes
    something goes to the other ranks first.

    Raises what ``ModelRunner`` does, and RanksMissing. ``tell`` hears how far the slowest rank is
    with loading, and why this process ends when a rank has ended.
    """

    def __init__(self, settings: EngineSettings, tell: Tell) -> None:
        self._tell = tell
        self._progress = _Slowest(tell)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel[FromRank]] = {}
        self._loaded: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._is_up = False
        self._encoding = range(1, settings.tensor_parallel_size)  # the others of the first stage
        self._log_level = _log_level()  # as the ranks have been told
        size, each = settings.processes, settings.processes // settings.nodes
        others = gather(settings, tell) if settings.nodes > 1 else {}
        own = local_address(next(iter(others.values()))) if others else LOOPBACK
        use_interface(own)
        sockets = {index: self._spawn(index) for index in range(1, each)}
        sockets |= {place.node * each + place.process: sock for place, sock in others.items()}

        # Late, so that the other processes of this host are importing the same meanwhile.
        from engine.choices import choose_device

        listener = listen(settings.rank_host if others else own, 0, size)
        part = Join(
            settings=dataclasses.replace(settings, device=choose_device(settings)),
            rank=0,
            size=size,
            index=0,
            each=each,
            address=(own, listener.getsockname()[1]),
            checkpoint=checkpoint_digest(Path(settings.model)),
            log_level=self._log_level,
            log_format=os.environ.get(FORMAT_VARIABLE) or "text",
        )
        with self._blaming():
            for rank, sock in sockets.items():
                self._invite(part, rank, sock)
            self._own = load_part(part, functools.partial(self._progress.hear, 0), listener)
        for _ in self._channels:
            self._loaded.get()
        self._is_up = True
        self._cost = Trial(self, settings).fit() if settings.step_budget_ms else None

    def _invite(self, part: Join, rank: int, sock: socket.socket) -> None:
        host, port = part.address
        if sock.family != socket.AF_UNIX:
            host = local_address(sock)  # where it has reached this host before
        channel = self._channels[rank] = Channel[FromRank](sock, FromRank, limit=_MOST)
        index, address = rank % part.each, (host, port)
        channel.send(msgspec.structs.replace(part, rank=rank, index=index, address=address))
        name = f"rank {rank}"
        threading.Thread(target=self._listen, args=(rank,), name=name, daemon=True).start()

    def _spawn(self, rank: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._children[rank] = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        return ours

    def ready(self) -> Ready:
        """The facts of the model, and of the memory that every rank got."""
        return self._own.ready()

    def prepare(self, request: EngineRequest) -> Future[object] | None:
        """See Runner; only rank 0 draws, and needs a grammar for it."""
        return self._own.prepare(request)

    def cost(self) -> CostModel | None:
        """What steps of all ranks together were seen to cost at the start."""
        return self._cost

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        """See Runner."""
        with self._blaming():
            self._send(Upload(request), buffers, to=self._encoding)
            self._own.upload(request, buffers)

    def begin(self, plan: StepPlan) -> None:
        """See Runner."""
        with self._blaming():
            if self._log_level != _log_level():
                self._log_level = _log_level()
                self._send(LogLevel(self._log_level))
            self._send(Begin(plan))
            self._own.begin(plan)

    def sample(self) -> None:
        """See Runner."""
        with self._blaming():
            self._send(Sample())
            self._own.sample()

    def finish(self) -> StepResult:
        """See Runner."""
        with self._blaming():
            self._send(Finish())
            return self._own.finish()

    def _send(
        self, order: Order, buffers: Sequence[Buffer] = (), to: Collection[int] | None = None
    ) -> None:
        pieces = frame(order, buffers)
        for rank in self._channels if to is None else to:
            self._channels[rank].write(pieces)

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """What fails here may fail because a rank has died. The thread that listens to it knows
        which and why, and ends this process: it gets the time to."""
        try:
            yield
        except ChannelClosed as error:
            time.sleep(_SOON)
            raise RuntimeError("a rank cannot be told anything") from error
        except RuntimeError:
            time.sleep(_SOON)
            raise

    def _listen(self, rank: int) -> None:
        """Until a rank ends, and this process with it."""
        channel, text = self._channels[rank], None
        with contextlib.suppress(ChannelClosed):
            while text is None:
                message, _ = channel.receive()
                if isinstance(message, Progress):
                    self._progress.hear(rank, message)
                elif isinstance(message, Loaded):
                    self._loaded.put(rank)
                else:
                    text = message.text
        self._end(rank, text)

    def _end(self, rank: int, text: str | None) -> NoReturn:
        with self._ending:  # of several that end together, the first
            if text is None:
                kind, text = "exit", self._status(rank)
            else:
                kind = "step" if self._is_up else "load"
            logger.error("rank %d: %s", rank, text)
            with contextlib.suppress(ChannelClosed):
                self._tell(Fault(kind, f"rank {rank}: {text}"))
            for child in self._children.values():
                child.kill()
            for child in self._children.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_ENDING)
            sys.stderr.flush()
            os._exit(1)

    def _status(self, rank: int) -> str:
        child = self._children.get(rank)
        if child is None:
            return "the connection to its host is lost"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(_ENDING)
            return f"it ended with signal {-status}" if status < 0 else f"it ended with {status}"
        return "it has closed its socket"


class _Slowest:
    """Tells the front end of the rank that is behind all others, whichever has got on."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._heard: dict[int, tuple[int, Progress]] = {}  # stages that were begun, and the last

    def hear(self, rank: int, progress: Progress) -> None:
        """A rank has got so far."""
        with self._lock:
            begun, last = self._heard.get(rank, (0, None))
            if last is None or last.stage != progress.stage:
                begun += 1
            self._heard[rank] = begun, progress
            _, slowest = min(
                self._heard.values(), key=lambda at: (at[0], at[1].done / max(at[1].total, 1))
            )
            self._tell(slowest)


def _log_level() -> str:
    return logging.getLevelName(logging.getLogger().level).lower()
