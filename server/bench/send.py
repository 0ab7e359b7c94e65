"""Requests sent to a server that streams its answers, by one process or by several."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import httpx

from server.target import said
from server.terminal import plain
from wire.errors import Unservable


@dataclasses.dataclass(frozen=True)
class Answer:
    """When its pieces of text came, in seconds after the request was due, and the tokens of both
    sides."""

    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of the requests, in ``seconds``; why there was no answer, how often.

    For ``busy`` of the time, 0 to 1, the client itself computed: the busiest of its processes, or
    all of them on all processors.
    """

    answers: list[Answer]
    errors: Counter[str]
    seconds: float
    busy: float


class Failed(Unservable):
    """A request has no whole answer."""


def send(
    options: dict[str, Any],
    bodies: list[bytes],
    due: list[float],
    at_once: int,
    processes: int = 1,
    ended: Callable[[], None] = lambda: None,
) -> Result:
    """Each body when it is ``due``, in seconds from the beginning, but no more than ``at_once``.

    ``options`` are those of a client of httpx; ``ended`` is called after each request. Several
    ``processes`` share out how many may be sent at once, and the requests accordingly, before the
    first is sent. Raises Failed if one of them ends too soon.
    """
    processes = min(processes, at_once, len(bodies))
    if processes == 1:
        return asyncio.run(_send(_client(options), bodies, due, at_once, ended))
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(_process()) for _ in range(processes)]
        results: list[Result] = []
        try:
            for index, pipe in enumerate(pipes):
                mine = [at for at in range(len(bodies)) if at % at_once % processes == index]
                count = len(range(index, at_once, processes))
                pipe.send((options, [bodies[at] for at in mine], [due[at] for at in mine], count))
            for pipe in pipes:
                pipe.recv()  # it is ready
            for pipe in pipes:
                pipe.send(None)
            while pipes:
                ready = wait(pipes)
                for pipe in [pipe for pipe in pipes if pipe in ready]:
                    told = pipe.recv()
                    if told is None:
                        ended()
                    else:
                        results.append(told)
                        pipes.remove(pipe)
        except (EOFError, ConnectionError):
            raise Failed("one of the processes that send has ended") from None
    total = sum(result.busy for result in results)
    return Result(
        [answer for result in results for answer in result.answers],
        sum((result.errors for result in results), Counter()),
        max(result.seconds for result in results),
        max(*(result.busy for result in results), total / (os.cpu_count() or 1)),
    )


@contextlib.contextmanager
def _process() -> Iterator[Connection]:
    """One that runs ``_serve`` at the other end, and ends with the context."""
    spawn = multiprocessing.get_context("spawn")  # a fork would share the sockets of its parent
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        with ours:
            yield ours
    finally:
        process.kill()
        process.join()
        process.close()


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is for who started it
    with contextlib.suppress(EOFError, ConnectionError):  # that has ended
        options, bodies, due, at_once = pipe.recv()
        client = _client(options)
        pipe.send(None)
        pipe.recv()
        ended = functools.partial(pipe.send, None)
        pipe.send(asyncio.run(_send(client, bodies, due, at_once, ended)))


def _client(options: dict[str, Any]) -> httpx.AsyncClient:
    return httpx.AsyncClient(**options, timeout=3600, limits=httpx.Limits(max_connections=None))


async def _send(
    client: httpx.AsyncClient,
    bodies: list[bytes],
    due: list[float],
    at_once: int,
    ended: Callable[[], None],
) -> Result:
    gate = asyncio.Semaphore(at_once)
    answers: list[Answer] = []
    errors: Counter[str] = Counter()

    async def one(body: bytes, moment: float) -> None:
        await asyncio.sleep(began + moment - time.perf_counter())
        async with gate:
            # What waits because others take their time has begun to wait when it was due.
            start = began + moment if moment else time.perf_counter()
            try:
                answers.append(await _ask(client, body, start))
            except Failed as error:
                errors[str(error)] += 1
            except (ValueError, LookupError, TypeError):
                errors["the answer is no stream of a chat"] += 1
            except httpx.HTTPError as error:
                errors[f"{type(error).__name__}: {error}"] += 1
        ended()

    async with client:
        began, computed = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(one, bodies, due))
        seconds = time.perf_counter() - began
        return Result(answers, errors, seconds, (time.process_time() - computed) / seconds)


async def _ask(client: httpx.AsyncClient, body: bytes, start: float) -> Answer:
    kind = {"content-type": "application/json"}
    arrivals: list[float] = []
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=kind) as reply:
        if reply.status_code != httpx.codes.OK:
            raise Failed(f"{reply.status_code}: {said(await reply.aread())}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Failed(f"the stream broke off: {plain(str(event['error']))}")
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") for choice in event["choices"]):
                arrivals.append(time.perf_counter() - start)
    if not arrivals or not usage:
        raise Failed(f"{len(arrivals)} pieces of text, usage {usage}")
    return Answer(arrivals, usage["prompt_tokens"], usage["completion_tokens"])
