"""The cases that servers are compared by. ``server.bench.client`` sends them, or
``benchmarks.vllm_client``: a client that we did not write."""

from server.bench.client import Case, Client
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
