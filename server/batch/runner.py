"""Sends the lines of a batch to a server, so many at a time, and writes down what it answers.

A line is either answered for good or left for the next run: what is refused for now (too many
requests, a server that starts again) is tried again until ``patience`` seconds are over, and then
no further line is begun.
"""

import asyncio
import contextlib
import email.utils
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError

import httpx
import msgspec

from server.batch.board import Board
from server.batch.lines import UNREADABLE, Failure, Item, Job, Misfit, Outcome, Reply
from server.batch.output import Output
from server.target import Target, said
from server.terminal import plain

# Refused for now: the same request may be answered later.
_AGAIN = frozenset({408, 429, 502, 503, 504})
# Refused whatever the line says: somebody has to see to the key first.
_NEVER = frozenset({401, 403})
_LONGEST_PAUSE = 30.0
_JSON = {"Content-Type": "application/json"}


class _Used(msgspec.Struct):
    completion_tokens: int = 0
    output_tokens: int = 0


class _Told(msgspec.Struct):
    usage: _Used | None = None


class Runner:
    """One run of a batch. ``trouble`` says why it has stopped before the end, if it has."""

    def __init__(
        self,
        target: Target,
        output: Output,
        board: Board,
        concurrency: int,
        patience: float,
        timeout: float,
    ) -> None:
        self.trouble = ""
        self._target, self._output, self._board = target, output, board
        self._concurrency, self._patience, self._timeout = concurrency, patience, timeout
        self._stop = asyncio.Event()
        self._writing = asyncio.Lock()
        self._unwritten: list[bytes] = []
        self._asked = self._kept = 0  # lines so far, in one order
        self._broken: OSError | None = None
        self._not_before = 0.0

    def stop(self) -> None:
        """Begin no further line."""
        self._stop.set()

    async def run(self, items: Iterable[Item]) -> bool:
        """Whether all lines are done. Raises OSError where the output cannot be written."""
        free = asyncio.Semaphore(self._concurrency)
        source = _Source(iter(items), self._stop)
        limits = httpx.Limits(max_connections=self._concurrency)
        timeout = httpx.Timeout(self._timeout, connect=10.0, pool=None)
        client = httpx.AsyncClient(**self._target.options, limits=limits, timeout=timeout)
        complete = True

        async def one(item: Item) -> None:
            nonlocal complete
            try:
                complete = await self._do(client, item) and complete
            except OSError as error:
                self._give_up(f"the output cannot be written: {error.strerror}")
                complete = False
            finally:
                free.release()

        async with client, asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                try:
                    item = await source.next()
                except OSError as error:
                    self._give_up(f"the input cannot be read: {error.strerror}")
                    break
                if item is None:
                    break
                group.create_task(one(item))
        return complete and not self._stop.is_set()

    async def _do(self, client: httpx.AsyncClient, item: Item) -> bool:
        """Whether the line is done."""
        tokens = 0
        if isinstance(item, Misfit):
            outcome = Outcome.of(item)
        else:
            answer = await self._ask(client, item)
            if answer is None:
                return False
            outcome, tokens = answer
        await self._write(outcome.encode())
        self._board.done(item.size, tokens, failed=outcome.failed)
        return True

    async def _ask(self, client: httpx.AsyncClient, job: Job) -> tuple[Outcome, int] | None:
        """What came of it and the tokens of the answer; None if it is left for another run."""
        began, tries = time.monotonic(), 0
        while True:
            while (wait := self._not_before - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), wait)
                if self._stop.is_set():
                    return None
            pause = min(_LONGEST_PAUSE, 0.5 * 2**tries) * random.uniform(0.5, 1)  # noqa: S311
            tries += 1
            try:
                reply = await client.post(job.url, content=job.body, headers=_JSON)
            except httpx.ReadTimeout:
                failure = Failure("timeout", f"no answer in {self._timeout:g} seconds")
                return Outcome(job.custom_id, error=failure), 0
            except httpx.RequestError as error:
                why = f"no server answers at {self._target.shown}: {plain(str(error))}"
            else:
                if reply.status_code not in _AGAIN | _NEVER:
                    return _answer(job, reply)
                pause = max(pause, _retry_after(reply))
                if reply.status_code in _NEVER:
                    pause = math.inf
                why = f"the server answers {reply.status_code}: {said(reply.content)}"
            if self._target.ended:
                why, pause = "the server has ended", math.inf
            if time.monotonic() + pause - began <= self._patience and not self._stop.is_set():
                # Whoever was refused is not alone: nobody asks before that.
                self._not_before = max(self._not_before, time.monotonic() + pause)
                continue
            self._give_up(why)
            return None

    def _give_up(self, why: str) -> None:
        if not self._stop.is_set():
            self.trouble = why
            self._stop.set()

    async def _write(self, line: bytes) -> None:
        """Return when it is on the disk, with all that came meanwhile. Raises OSError."""
        self._unwritten.append(line)
        self._asked += 1
        mine = self._asked
        async with self._writing:
            if mine <= self._kept:
                return  # whatever became of those behind it
            if self._broken is None:
                lines, self._unwritten = self._unwritten, []
                try:
                    await asyncio.to_thread(self._output.write, lines)
                except OSError as error:
                    self._broken = error
                else:
                    self._kept += len(lines)
                    return
            raise self._broken


class _Source:
    """Items of an iterator that may take its time, as a pipe does, until somebody says stop."""

    def __init__(self, items: Iterator[Item], stop: asyncio.Event) -> None:
        self._items: asyncio.Queue[Item | BaseException | None] = asyncio.Queue(1)
        self._stop = stop
        loop = asyncio.get_running_loop()

        def put(item: Item | BaseException | None) -> None:
            asyncio.run_coroutine_threadsafe(self._items.put(item), loop).result()

        def read() -> None:
            # Cancelled, or no loop any more: nobody reads this.
            with contextlib.suppress(RuntimeError, asyncio.CancelledError, CancelledError):
                try:
                    for item in items:
                        put(item)
                    put(None)
                except Exception as error:
                    put(error)

        # Ends with the process, wherever it is: nothing can wake it from reading a terminal.
        threading.Thread(target=read, daemon=True).start()

    async def next(self) -> Item | None:
        """None at the end. Raises OSError where the input cannot be read."""
        getting = asyncio.ensure_future(self._items.get())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({getting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if self._stop.is_set():
            getting.cancel()
            return None
        found = getting.result()
        if isinstance(found, BaseException):
            raise found
        return found


def _answer(job: Job, reply: httpx.Response) -> tuple[Outcome, int]:
    tokens, body = 0, reply.content
    try:
        used = msgspec.json.decode(body, type=_Told).usage or _Used()
        tokens = used.completion_tokens or used.output_tokens
        body.decode()
        if b"\n" in body:
            body = msgspec.json.format(body, indent=-1)
    except UNREADABLE:
        try:  # another form of usage, or no JSON at all
            body = msgspec.json.encode(msgspec.json.decode(body))
        except UNREADABLE:
            body = msgspec.json.encode(body[:10_000].decode(errors="replace"))
    told = Reply(reply.status_code, reply.headers.get("x-request-id", ""), msgspec.Raw(body))
    return Outcome(job.custom_id, told), tokens


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that the server asks to be left alone for."""
    text = reply.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        if text.isascii() and text.strip().isdecimal():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
