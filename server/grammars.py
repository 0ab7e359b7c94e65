"""Whether a client's grammar can be compiled, asked of a worker process before the engine hears of
it. The worker is started at the first question and again after each grammar that kills it."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import signal
import sys
from collections import OrderedDict

import msgspec

from preprocessing.pool import child_environment
from server.grammar_worker import Vocabulary
from server.tokenizer import Tokenizer
from wire.errors import Unavailable
from wire.sampling import Grammar

logger = logging.getLogger(__name__)

# Of waiting for one answer. A worker that is refused the processor for so long is as good as dead.
TIMEOUT = 20.0
# Of waiting for a turn.
QUEUE_TIMEOUT = 60.0
_KEPT = 256
TOO_LONG = "takes too long to compile"


@dataclasses.dataclass(frozen=True)
class _Worker:
    process: asyncio.subprocess.Process
    questions: asyncio.StreamWriter
    answers: asyncio.StreamReader


class GrammarChecker:
    """Asks one grammar at a time, of one tenant after the other; what was found good last is not
    asked again."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        # One of each tenant waits for the turn, so that nobody's many hold up another's one.
        self._tenants = collections.defaultdict[bytes, asyncio.Lock](asyncio.Lock)
        self._worker: _Worker | None = None
        self._vocabulary = b""
        self._good: OrderedDict[tuple[bytes, Grammar], None] = OrderedDict()

    async def problem(
        self, grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, tenant: bytes = b""
    ) -> str | None:
        """What is wrong with a grammar, to be read behind the name of a field; None if it is good.
        Raises Unavailable if others keep the worker busy for too long.

        The question of one who leaves meanwhile is still answered, to nobody: to end the worker
        would cost the next one the time in which another starts.
        """
        found = grammar.problem()
        if found is not None:
            return found
        vocabulary = msgspec.json.encode(Vocabulary(vocab_size, tokenizer.added))
        if self._is_known(vocabulary, grammar):
            return None
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT) as waiting, self._tenants[tenant]:
                await self._turn.acquire()
                asking = asyncio.create_task(self._examine(vocabulary, grammar))
                asking.add_done_callback(lambda _: self._turn.release())
                waiting.reschedule(None)
                return await asyncio.shield(asking)
        except TimeoutError:
            raise Unavailable(
                "Too many grammars are waiting to be compiled.", retry_after=10
            ) from None

    def _is_known(self, vocabulary: bytes, grammar: Grammar) -> bool:
        if (vocabulary, grammar) not in self._good:
            return False
        self._good.move_to_end((vocabulary, grammar))
        return True

    async def _examine(self, vocabulary: bytes, grammar: Grammar) -> str | None:
        if self._is_known(vocabulary, grammar):  # since a moment ago
            return None
        if vocabulary != self._vocabulary:
            await self._end()
            self._vocabulary = vocabulary
        found = await self._ask(grammar)
        if found is None:
            self._good[vocabulary, grammar] = None
            if len(self._good) > _KEPT:
                self._good.popitem(last=False)
        return found

    async def close(self) -> None:
        """End the worker."""
        async with self._turn:
            await self._end()

    async def _ask(self, grammar: Grammar) -> str | None:
        worker = self._worker = self._worker or await self._start()
        answer = b""
        try:
            async with asyncio.timeout(TIMEOUT):
                with contextlib.suppress(ConnectionError):  # it is dead, as the answer will tell
                    worker.questions.write(msgspec.json.encode(grammar) + b"\n")
                    await worker.questions.drain()
                answer = await worker.answers.readline()
                if not answer:
                    # To kill what has died already would hide what it died of.
                    await worker.process.wait()
        except TimeoutError:
            return TOO_LONG
        finally:
            if not answer:
                await self._end()
        if not answer:
            too_long = worker.process.returncode == -signal.SIGPROF
            return TOO_LONG if too_long else "cannot be compiled"
        reason = msgspec.json.decode(answer, type=str | None)
        return reason and f"cannot be compiled: {reason}"

    async def _start(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "server.grammar_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A library that panics quotes what clients send.
            stderr=None if logger.isEnabledFor(logging.DEBUG) else asyncio.subprocess.DEVNULL,
            env=child_environment(),
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process without its pipes")
        process.stdin.write(self._vocabulary + b"\n")
        return _Worker(process, process.stdin, process.stdout)

    async def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
            await worker.process.wait()
