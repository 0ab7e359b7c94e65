"""A load, a client that has it sent, and the figures of what came back.

The client speaks the OpenAI protocol to any server. Prompts are seeded random words, as many as
make the wanted number of tokens with the server's own tokenizer; pictures are seeded too: noise
as PNG, or smooth as JPEG.
"""

import base64
import dataclasses
import functools
import io
import itertools
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from server.bench.send import Answer, Failed, Result, send
from server.target import Target

PERCENTILES = (50, 90, 99)

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
    """Requests alike. ``picture`` is the width of each of their ``pictures`` in pixels, 0: they
    have none; ``height`` 0: it is a square. A ``photo`` is smooth with some noise, as JPEG.

    The first ``shared`` tokens are the same in all requests, and so are the pictures if ``again``;
    then one request more is sent before the measured ones.

    With a ``rate``, so many requests per second begin, at random moments and whatever becomes of
    them; else the next one begins when one of ``concurrency`` has ended.
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
    height: int = 0
    pictures: int = 1
    photo: bool = False
    rate: float = 0.0

    @property
    def primed(self) -> bool:
        return self.again or self.shared > 0

    def at_most(self, requests: int) -> "Case":
        """With fewer requests, but as many as are sent at once."""
        return dataclasses.replace(
            self, requests=max(self.concurrency, min(requests, self.requests))
        )


class Client:
    """Sends cases to a server that is ready, to its first model unless one is named, by so many
    ``processes``.

    Raises server.target.Unreachable or Failed where it does not answer as it should.
    """

    def __init__(self, target: Target, model: str = "", processes: int = 1) -> None:
        self.target = target
        self.processes = processes
        self.model = model or target.model()
        # Not the words of any seed, which would be in the server's cache when they are measured.
        chance = random.Random("words")  # noqa: S311
        short, long = (self._ask(_text(chance, count), 8) for count in (32, 96))
        self._tokens_per_word = (long.prompt_tokens - short.prompt_tokens) / 64
        if self._tokens_per_word <= 0:
            raise Failed(f"{target.shown} does not count the tokens of a prompt")

    @property
    def url(self) -> str:
        """Without a path."""
        return self.target.shown

    def measure(self, case: Case, seed: int) -> dict[str, float | None]:
        """What ``summary`` says of the requests of ``case``; ``seed`` decides their contents. All
        must be answered."""
        result = self.run(case, seed)
        if result.errors:
            raise Failed(next(iter(result.errors)))
        return summary(result.answers, result.seconds) | {"client_busy": result.busy}

    def run(self, case: Case, seed: int, ended: Callable[[], None] = lambda: None) -> Result:
        """The same for any case; ``ended`` is called after each request."""
        contents = self._contents(case, seed)
        if case.primed:
            self._ask(contents.pop(), case.output_tokens)
        due = [0.0] * len(contents)
        if case.rate:
            chance = random.Random(seed)  # noqa: S311
            due = list(itertools.accumulate(chance.expovariate(case.rate) for _ in contents))
        at_once = case.concurrency if not case.rate else len(contents)
        # Written before the clock starts: pictures are megabytes.
        bodies = [self._body(content, case.output_tokens) for content in contents]
        return send(self.target.options, bodies, due, at_once, self.processes, ended)

    def _contents(self, case: Case, seed: int) -> list[Content]:
        chance, noise = random.Random(seed), np.random.default_rng(seed)  # noqa: S311
        words = round(case.input_tokens / self._tokens_per_word)
        shared = _text(chance, round(case.shared / self._tokens_per_word))
        contents = [shared + _text(chance, words) for _ in range(case.requests + case.primed)]
        if case.picture:
            count = (1 if case.again else len(contents)) * case.pictures
            draws = noise.spawn(count) if case.photo else [noise] * count
            with ThreadPoolExecutor(None if case.photo else 1) as pool:  # draws of one keep order
                painted = list(pool.map(functools.partial(_painted, case), draws))
            for index, content in enumerate(contents):
                first = 0 if case.again else index * case.pictures
                content[:0] = painted[first : first + case.pictures]
        return contents

    def _ask(self, content: Content, tokens: int) -> Answer:
        """One request, which must be answered."""
        result = send(self.target.options, [self._body(content, tokens)], [0.0], 1)
        if result.errors:
            raise Failed(next(iter(result.errors)))
        return result.answers[0]

    def _body(self, content: Content, tokens: int) -> bytes:
        return json.dumps(self._request(content, tokens)).encode()

    def _request(self, content: Content, tokens: int) -> dict[str, Any]:
        """For so many tokens; a subclass may put it as another server wants it."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,  # random weights may end an answer at any token
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float | None]:
    """Figures of requests that took ``seconds`` together.

    Milliseconds to the first text (``ttft``), between two pieces of text (``itl``), per token
    behind the first (``tpot``) and to the last text (``e2e``). A piece of text may hold several
    tokens. A percentile that fewer than one of the values could lie above is None.
    """
    tokens = sum(answer.output_tokens for answer in answers)
    values: dict[str, list[float]] = {
        "ttft": [answer.arrivals[0] for answer in answers],
        "tpot": [
            (answer.arrivals[-1] - answer.arrivals[0]) / (answer.output_tokens - 1)
            for answer in answers
            if answer.output_tokens > 1
        ],
        "itl": [gap for answer in answers for gap in np.diff(answer.arrivals)],
        "e2e": [answer.arrivals[-1] for answer in answers],
    }
    figures: dict[str, float | None] = {
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": tokens,
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": tokens / seconds,
    }
    for name, found in values.items():
        figures[f"{name}_count"] = len(found)
        for percent in PERCENTILES:
            figures[f"{name}_p{percent}_ms"] = _ms(found, percent)
    return figures


def limit(busy: float) -> str:
    """What to say of figures of a client that computed for so much of the time; nothing where
    that leaves them as they are."""
    if busy <= 0.5:
        return ""
    return f"the client was busy for {busy:.0%} of the time, and may be the limit"


def _ms(seconds: Sequence[float], percent: int) -> float | None:
    if not seconds or (percent > 50 and len(seconds) * (100 - percent) < 100):
        return None
    return float(np.percentile(seconds, percent)) * 1000


def _text(chance: random.Random, words: int) -> Content:
    text = "".join(f"{word} " for word in chance.choices(WORDS, k=words))
    return [{"type": "text", "text": text}]


def _painted(case: Case, chance: np.random.Generator) -> dict[str, Any]:
    size = case.height or case.picture, case.picture
    buffer = io.BytesIO()
    if case.photo:
        Image.fromarray(_photograph(chance, *size)).save(buffer, "JPEG", quality=90)
    else:
        pixels = chance.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    url = f"data:image/{'jpeg' if case.photo else 'png'};base64,{encoded}"
    return {"type": "image_url", "image_url": {"url": url}}


def _photograph(chance: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Of which a JPEG is about as large as a camera's."""
    down, across = (
        (60 * np.sin(np.arange(length)[:, None] / chance.uniform(80, 160, 3))).astype(np.int16)
        for length in (height, width)
    )
    grain = chance.integers(-8, 8, (height, width, 1), dtype=np.int16)
    pixels: np.ndarray = (down[:, None] + (across + 128) + grain).astype(np.uint8)
    return pixels
