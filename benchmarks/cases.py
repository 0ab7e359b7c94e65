"""The cases that servers are compared by. ``server.bench.client`` sends them, or
``benchmarks.vllm_client``: a client that we did not write."""

import json
from typing import Any

from server.bench.client import Case, Client, Content
from server.target import Target

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


def gpu_cases(shape: str) -> tuple[Case, ...]:
    """Cases of a GPU, for the shape of this name."""
    text = {"input_tokens": 1024, "output_tokens": 256}
    shown: dict[str, Any] = {"input_tokens": 32, "output_tokens": 128, "concurrency": 16}
    photo = shown | {"photo": True, "picture": 4032, "height": 3024}
    return (
        Case(f"{shape}-text-c1", f"{shape}: 1,024 tokens, 1 at once", 4, **text),
        Case(f"{shape}-text-c16", f"{shape}: 16 at once", 32, concurrency=16, **text),
        Case(f"{shape}-text-c64", f"{shape}: 64 at once", 128, concurrency=64, **text),
        Case(f"{shape}-tile-c16", f"{shape}: 448² picture, 16 at once", 64, picture=448, **shown),
        Case(
            f"{shape}-1080p-c16",
            f"{shape}: 1080p photograph, 16 at once",
            48,
            **(photo | {"picture": 1920, "height": 1080}),
        ),
        Case(
            f"{shape}-12mp-c1",
            f"{shape}: 12 MP photograph, 1 at once",
            4,
            **(photo | {"concurrency": 1}),
        ),
        Case(f"{shape}-12mp-c16", f"{shape}: 16 at once", 48, **photo),
        Case(f"{shape}-again-c16", f"{shape}: all about one", 48, again=True, **photo),
    )


def our_client(url: str, processes: int = 1) -> Client:
    """Of the server at a URL without a path. Raises what ``Client`` raises."""
    return Client(Target(url), processes=processes)


class TransformersClient(Client):
    """Of ``transformers serve``, which calls its model by the folder it was given, and names none.

    It refuses a request with ``ignore_eos``; how long an answer must be is told as it is to
    ``generate``.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__(Target(url), model)

    def _request(self, content: Content, tokens: int) -> dict[str, Any]:
        request = super()._request(content, tokens)
        del request["ignore_eos"]
        return request | {"generation_config": json.dumps({"min_new_tokens": tokens})}
