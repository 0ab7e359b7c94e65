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


def our_client(url: str) -> Client:
    """Of the server at a URL without a path. Raises what ``Client`` raises."""
    return Client(Target(url))


class TransformersClient(Client):
    """Of ``transformers serve``, which calls its model by the folder it was given, and names none.

    It refuses a request with ``ignore_eos``; how long an answer must be is told as it is to
    ``generate``.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__(Target(url), model)

    def _body(self, content: Content, tokens: int) -> dict[str, Any]:
        body = super()._body(content, tokens)
        del body["ignore_eos"]
        return body | {"generation_config": json.dumps({"min_new_tokens": tokens})}
