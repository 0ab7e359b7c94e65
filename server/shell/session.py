"""The conversation: what was said, and the next answer as a stream of text."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from server.target import said
from server.terminal import plain

_URL = "/v1/chat/completions"
_JSON = {"Content-Type": "application/json"}


class Refused(Exception):
    """There is no answer, or no more of it; the message says why, in a line."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """What an answer has taken."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Detail(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Detail | None = None


class Session:
    """``messages`` are turns that were answered, ``last`` is the user's last turn, answered or not.
    ``options`` are fields of every request. ``facts`` says what the last answer has taken."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {"model": model}
        self.system = ""
        self.last: dict[str, Any] | None = None
        self.facts = ""
        self._client = client

    def body(self) -> dict[str, Any]:
        """Options and messages, as a request has them."""
        return self._with(self.messages)

    def _with(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return self.options | {"messages": first + messages}

    def again(self) -> Iterator[str]:
        """Another answer to the last turn. Raises Refused."""
        if self.last is None:
            raise Refused("nothing was asked yet")
        is_answered = len(self.messages) > 1 and self.messages[-2] is self.last
        return self._answer(self.last, self.messages[:-2] if is_answered else self.messages)

    def ask(self, turn: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer, which is kept as far as it is read. Raises Refused."""
        self.last = turn
        return self._answer(turn, self.messages)

    def _answer(self, turn: dict[str, Any], before: list[dict[str, Any]]) -> Iterator[str]:
        self.facts = ""
        body = self._with([*before, turn])
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        pieces: list[str] = []
        usage, began, first = Usage(), time.monotonic(), 0.0
        try:
            for event in self._events(body):
                usage = event.usage or usage
                for choice in event.choices:
                    if choice.delta.content:
                        first = first or time.monotonic()
                        pieces.append(choice.delta.content)
                        yield choice.delta.content
        finally:
            if pieces:
                answer = {"role": "assistant", "content": "".join(pieces)}
                self.messages = [*before, turn, answer]
        self.facts = _facts(usage, first - began, time.monotonic() - first)

    def _events(self, body: dict[str, Any]) -> Iterator[_Event]:
        try:
            content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):  # such as NaN, or half of a character
            raise Refused("a value in it cannot be sent; /set shows the fields") from None
        try:
            with self._client.stream("POST", _URL, content=content, headers=_JSON) as reply:
                if reply.status_code != httpx.codes.OK:
                    raise Refused(f"{reply.status_code}: {said(reply.read())}")
                for data in _data(reply.iter_bytes()):
                    if data == b"[DONE]":
                        return
                    event = msgspec.json.decode(data, type=_Event)
                    if event.error is not None:
                        raise Refused(plain(" ".join(event.error.message.split())))
                    yield event
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Refused(f"the connection broke off: {plain(why)}") from None
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Refused("the answer is no stream of a chat") from None


def _data(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The data of server-sent events that have a line each."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _facts(usage: Usage, wait: float, rest: float) -> str:
    facts = [f"{usage.prompt_tokens} tokens in"]
    details = usage.prompt_tokens_details
    if details is not None and details.cached_tokens:
        facts[0] += f" ({details.cached_tokens} cached)"
    facts += [f"{usage.completion_tokens} out", f"first after {max(wait, 0):.2f} s"]
    if usage.completion_tokens > 1 and rest > 0:
        facts.append(f"{(usage.completion_tokens - 1) / rest:.1f} tokens/s")
    return ", ".join(facts)
