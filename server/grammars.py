"""Whether a client's grammar can be compiled, asked of a worker process before the engine hears of
it. The worker is started at the first question and again after each grammar that kills it."""

import asyncio
import contextlib
import dataclasses
import signal
import sys
from collections import OrderedDict

import msgspec

from server.grammar_worker import Vocabulary
from server.tokenizer import Tokenizer
from wire.sampling import Grammar

# Of waiting for one answer. A worker that is refused the processor for so long is as good as dead.
TIMEOUT = 20.0
_KEPT = 256
TOO_LONG = "takes too long to compile"


@dataclasses.dataclass(frozen=True)
class _Worker:
    process: asyncio.subprocess.Process
    questions: asyncio.StreamWriter
    answers: asyncio.StreamReader


class GrammarChecker:
    """Asks one grammar at a time; what was found good last is not asked again."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None
        self._vocabulary = b""
        self._good: OrderedDict[tuple[bytes, Grammar], None] = OrderedDict()

    async def problem(self, grammar: Grammar, tokenizer: Tokenizer, vocab_size: int) -> str | None:
        """What is wrong with a grammar, to be read behind the name of a field; None if it is good.

        Whoever is cancelled meanwhile costs the worker its life, as its answer would be taken for
        that of the next.
        """
        found = grammar.problem()
        if found is not None:
            return found
        vocabulary = msgspec.json.encode(Vocabulary(vocab_size, tokenizer.added))
        if (vocabulary, grammar) in self._good:
            self._good.move_to_end((vocabulary, grammar))
            return None
        async with self._turn:
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
            *(sys.executable, "-m", "server.grammar_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
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
