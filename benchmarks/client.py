"""The cases that servers are compared by, and a streaming client that sends them.

The client speaks the OpenAI protocol to any server. Prompts are seeded random words, as many as
make the wanted number of tokens with the server's own tokenizer; pictures are seeded noise, sent as
PNG. ``benchmarks.vllm_client`` sends the same cases by a client that we did not write.
"""

import asyncio
import base64
import dataclasses
import io
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

# Frequent English words: about a token each in the vocabulary of a language model.
_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been "
    "call who oil its now find long down day did get come made may part"
)
WORDS = _COMMON.split()

Content = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests alike. ``picture`` is the side of a square in pixels; 0: none.

    The first ``shared`` tokens are the same in all requests, and so is the picture if ``again``;
    then one request more is sent before the measured ones.
    """

    name: str
    title: str
    requests: int
    concurrency: int = 1
    input_tokens: int = 128
    output_tokens: int = 64
    shared: int = 0
    picture: int = 0
    again: bool = False

    @property
    def primed(self) -> bool:
        return self.again or self.shared > 0

    def at_most(self, requests: int) -> "Case":
        """With fewer requests, but as many as are sent at once."""
        return dataclasses.replace(
            self, requests=max(self.concurrency, min(requests, self.requests))
        )


_PICTURE = {"input_tokens": 16, "output_tokens": 32}
CASES = (
    Case("text-c1", "text, 1 at once", 4),
    Case("text-c4", "text, 4 at once", 8, concurrency=4),
    Case("text-c16", "text, 16 at once", 16, concurrency=16),
    Case("picture-c1", "448² picture, 1 at once", 4, picture=448, **_PICTURE),
    Case("picture-c4", "448² picture, 4 at once", 8, concurrency=4, picture=448, **_PICTURE),
    Case("picture-896", "896² picture", 3, picture=896, **_PICTURE),
    Case("again", "the same picture again", 4, picture=448, again=True, **_PICTURE),
    Case("prefix", "512 tokens shared", 4, input_tokens=32, output_tokens=32, shared=512),
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """When its pieces of text came, in seconds after the request, and the tokens of both sides."""

    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int


class Client:
    """Sends cases to a server that is ready; ``url`` has no path.

    Raises httpx.HTTPError or RuntimeError where the server does not answer as it should.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with httpx.Client(base_url=url, timeout=600) as client:
            models = client.get("/v1/models").raise_for_status().json()
        self.model = models["data"][0]["id"]
        chance = random.Random(0)
        short, long = (self._send([_text(chance, count)], 8)[0] for count in (32, 96))
        self._tokens_per_word = (long.prompt_tokens - short.prompt_tokens) / 64

    def measure(self, case: Case, seed: int) -> dict[str, float]:
        """What ``summary`` says of the requests of ``case``; ``seed`` decides their contents."""
        contents = self._contents(case, seed)
        if case.primed:
            self._send([contents.pop()], case.output_tokens)
        began = time.perf_counter()
        answers = self._send(contents, case.output_tokens, case.concurrency)
        return summary(answers, time.perf_counter() - began)

    def _contents(self, case: Case, seed: int) -> list[Content]:
        chance, noise = random.Random(seed), np.random.default_rng(seed)
        words = round(case.input_tokens / self._tokens_per_word)
        shared = _text(chance, round(case.shared / self._tokens_per_word))
        contents = [shared + _text(chance, words) for _ in range(case.requests + case.primed)]
        shape = (case.picture, case.picture, 3)
        for index, content in enumerate(contents if case.picture else ()):
            if index == 0 or not case.again:
                picture = _part(noise.integers(0, 256, shape, dtype=np.uint8))
            content.insert(0, picture)
        return contents

    def _send(self, contents: Sequence[Content], tokens: int, concurrency: int = 1) -> list[Answer]:
        async def run() -> list[Answer]:
            gate = asyncio.Semaphore(concurrency)
            async with httpx.AsyncClient(base_url=self.url, timeout=3600) as client:
                return await asyncio.gather(
                    *(self._ask(client, gate, content, tokens) for content in contents)
                )

        return asyncio.run(run())

    async def _ask(
        self, client: httpx.AsyncClient, gate: asyncio.Semaphore, content: Content, tokens: int
    ) -> Answer:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,  # random weights may end an answer at any token
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        arrivals: list[float] = []
        usage: dict[str, int] = {}
        async with gate:
            began = time.perf_counter()
            async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                if reply.status_code != httpx.codes.OK:
                    raise RuntimeError(f"{reply.status_code}: {(await reply.aread())[:300]!r}")
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(f"the stream broke off: {event['error']}")
                    usage = event.get("usage") or usage
                    if any(choice["delta"].get("content") for choice in event["choices"]):
                        arrivals.append(time.perf_counter() - began)
        if not arrivals or not usage:
            raise RuntimeError(f"{len(arrivals)} pieces of text, usage {usage}")
        return Answer(arrivals, usage["prompt_tokens"], usage["completion_tokens"])


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Figures of requests that took ``seconds`` together.

    Milliseconds to the first text (``ttft``), between two pieces of text (``itl``) and per token
    behind the first (``tpot``). A piece of text may hold several tokens.
    """
    tokens = sum(answer.output_tokens for answer in answers)
    gaps = np.concatenate([np.diff(answer.arrivals) for answer in answers])
    per_token = [
        (answer.arrivals[-1] - answer.arrivals[0]) / max(answer.output_tokens - 1, 1)
        for answer in answers
    ]
    return {
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": tokens,
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": tokens / seconds,
        "ttft_p50_ms": _ms([answer.arrivals[0] for answer in answers], 50),
        "tpot_p50_ms": _ms(per_token, 50),
        "itl_p50_ms": _ms(gaps, 50),
        "itl_p99_ms": _ms(gaps, 99),
    }


def _ms(seconds: Sequence[float] | np.ndarray, percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1000 if len(seconds) else 0.0


def _text(chance: random.Random, words: int) -> Content:
    text = "".join(f"{word} " for word in chance.choices(WORDS, k=words))
    return [{"type": "text", "text": text}]


def _part(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
