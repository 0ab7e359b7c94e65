"""What a trace has of generating: a span for the answers of one chat, with what OpenTelemetry's
conventions for generative AI name, and below it for each choice what the engine has spent its
time with. Where nothing is traced, nothing is done per token."""

import time
from collections.abc import Sequence
from typing import Protocol

from engine.client import EngineClient
from server.chat.prepare import PreparedChat
from wire import spans
from wire.messages import EngineOutput
from wire.spans import NOTHING, Span


class State(Protocol):
    """A choice, as server.chat.stream has it."""

    finish_reason: str | None
    completion_tokens: int


class Generation:
    """The answers of one chat by ``engine``, from now on."""

    def __init__(self, chat: PreparedChat, engine: EngineClient) -> None:
        above = spans.current.get()
        self._is_traced = above is not None
        sampling = chat.engine.sampling
        kind = "text_completion" if chat.engine.id.startswith("cmpl-") else "chat"
        self._span = NOTHING if above is None else above.child(f"{kind} {chat.model.name}")
        self._began = self._asked = time.time()
        self._decoding: dict[int, Span] = {}
        self._failed = False
        self._engine, self._restarts = engine, engine.restarts
        self._span.set(
            {
                "gen_ai.operation.name": kind,
                "gen_ai.provider.name": "internvl",
                "gen_ai.request.model": chat.model.name,
                "gen_ai.request.choice.count": chat.n if chat.n > 1 else None,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.stream": chat.stream,
                "gen_ai.response.model": chat.model.name,
                "gen_ai.response.id": chat.engine.id,
                "gen_ai.usage.input_tokens": len(chat.engine.prompt),
                "internvl.pictures": len(chat.engine.items),
                "internvl.tiles": sum(item.tiles for item in chat.engine.items),
                "internvl.visual_tokens": sum(item.length for item in chat.engine.items),
            }
        )

    def begin(self, index: int, output: EngineOutput) -> None:
        """The first tokens of a choice. Where the parts before them stood is known from how long
        the engine says they took."""
        if not self._is_traced:
            return
        now, times = time.time(), output.times
        begun = self._asked if times is None else max(now - times.prefill, self._asked)
        if times is not None:
            queue = self._span.child("queue", max(begun - times.queue, self._asked))
            queue.set({"internvl.choice": index})
            queue.end(begun)
        prefill = self._span.child("prefill", begun)
        prefill.set({"internvl.choice": index, "internvl.cached_tokens": output.cached_tokens})
        if encoded := [seconds for seconds in output.encode_seconds or () if seconds]:
            encode = prefill.child("encode", begun)
            encode.set({"internvl.choice": index, "internvl.pictures": len(encoded)})
            encode.end(min(begun + sum(encoded), now))
        prefill.end(now)
        if not self._decoding:
            self._span.set({"gen_ai.response.time_to_first_chunk": now - self._began})
            self._asked = now  # the others are asked for now
        self._decoding[index] = self._span.child("decode", now)

    def end(self, index: int, state: State) -> None:
        """A choice is over."""
        decode = self._decoding.pop(index, NOTHING)
        decode.set({"internvl.choice": index, "internvl.tokens": state.completion_tokens})
        decode.end()

    def fail(self, error: Exception) -> None:
        """They are given up because of it."""
        self._failed = True
        self._span.fail(error)

    def close(self, states: Sequence[State], cached: int) -> None:
        """All are over, or given up."""
        for index in list(self._decoding):
            self.end(index, states[index])
        reasons = [state.finish_reason or "abort" for state in states]
        self._span.set(
            {
                "gen_ai.usage.output_tokens": sum(state.completion_tokens for state in states),
                "gen_ai.usage.cache_read.input_tokens": cached,
                "gen_ai.response.finish_reasons": reasons,
                "internvl.engine_restarts": self._engine.restarts - self._restarts or None,
                "error.type": spans.ABORTED if "abort" in reasons and not self._failed else None,
            }
        )
        self._span.end()
