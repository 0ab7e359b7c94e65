"""The messages between the front end and the engine: one tagged union per direction.

Pixels do not travel inside a message: a ``VisionItem`` names the index of its raw buffer, which
the channel sends beside the message.
"""

from array import array
from collections.abc import Iterable

import msgspec

from wire.geometry import PromptFormat, VisionGeometry
from wire.logs import NOBODY
from wire.sampling import SamplingParams


class VisionItem(msgspec.Struct, frozen=True, array_like=True):
    """One picture inside a prompt.

    ``digest`` identifies pixels and tile settings. The picture's context tokens stand at
    ``prompt[offset : offset + length]`` and ``length == tiles * tokens_per_tile``; ``<img>``
    and ``</img>`` are outside. ``buffer`` is the index of the raw uint8 buffer
    ``[tiles, 3, side, side]`` that travels beside the request. ``step`` is how many positions each
    of the tokens takes (``wire.positions``).
    """

    digest: bytes
    offset: int
    length: int
    tiles: int
    buffer: int
    step: float = 1.0


class EngineRequest(msgspec.Struct, frozen=True, tag="request"):
    """One sequence to generate. ``prompt`` holds token ids, pictures already as context ids.

    Only requests with the same ``cache_salt`` share cached prefixes.
    Under the priority policy the least ``priority`` goes first. Under the fair policy tenants share
    the engine by ``weight`` (above 0, finite).
    ``output`` holds the tokens that an engine which died had generated of it: the sequence goes on
    behind them, and none of them is reported again.
    ``origin`` is the X-Request-Id of who asked, for the log.
    ``prediction`` is text that may come in part, its tokens by ``pack``; only how long the answer
    takes depends on it. How many tokens of prompts may wait is limited, and of these is not.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    items: list[VisionItem] = []
    cache_salt: bytes = b""
    output: list[int] = []
    priority: int = 0
    tenant: bytes = b""
    weight: float = 1.0
    origin: str = NOBODY
    prediction: bytes = b""


def pack(ids: Iterable[int]) -> bytes:
    """Token ids as int32, which take a tenth of what a list does."""
    return array("i", ids).tobytes()


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests and free what they hold; unknown ids are ignored."""

    ids: list[str]


class Flush(msgspec.Struct, frozen=True, tag="flush"):
    """Let nobody find what was cached until now: keys and values of prefixes, and encoded pictures.
    What running requests use they keep."""


class LogLevel(msgspec.Struct, frozen=True, tag="log_level"):
    """The least severe level to log from now on, as the setting ``log_level``."""

    level: str


class Profile(msgspec.Struct, frozen=True, tag="profile"):
    """Begin to watch where the engine's time goes, or end it and say so. ``of`` is "engine": the
    calls of its thread; or "model": the operations and kernels of some steps."""

    on: bool
    of: str = "engine"


Control = Abort | Flush | LogLevel | Profile
ToEngine = EngineRequest | Control


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of a drawn token, and (id, log-probability) of the likeliest, best first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of a token of the prompt, how many tokens were at least as likely in its
    place, and (id, log-probability) of the likeliest, best first, or of those that were named."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Times(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Seconds of a request in its engine: until it entered the batch, from there to its first
    token, however often it was preempted, and from there to its last. The first output has the
    first two, the last one the third. The engine's client adds the third to those between: how
    long after the first token they arrived."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float | None = None


class EngineOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request. ``finish_reason`` is None, "stop", "length", "stuck" or "error".

    A stop token ends a request with "stop" and is the last of ``token_ids``;
    One that is "stuck" allows no token to come next: its own parameters contradict each other here.
    ``error`` says what went wrong when the reason is "error". ``cached_tokens`` positions of
    the prompt were found in the prefix cache. ``logprobs`` has an entry per token if asked for;
    ``prompt_logprobs`` stands in the first output, with one per token of the prompt but the first,
    or per position of a lookup.
    ``encode_seconds`` has an entry per item of the request: what encoding it took since the last
    output. None where nothing was encoded. ``times`` are told by an engine that had the request
    from its beginning.
    """

    id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[PromptLogprobs] | None = None
    encode_seconds: list[float] | None = None
    times: Times | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges after a step, and counters since the engine started. The caches are looked at once for
    each sequence, however often it is preempted: the prefix cache for ``prefix_queries`` tokens,
    of which ``cached_tokens`` were there, the vision cache for pictures."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    vision_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    encoded_tiles: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    step_seconds: float = 0.0  # that steps took, and that the cost model had predicted
    predicted_seconds: float = 0.0
    prefix_queries: int = 0
    vision_queries: int = 0
    vision_hits: int = 0
    speculated_tokens: int = 0  # that were computed on trial, and those that were right
    accepted_tokens: int = 0

    def behind(self, past: "EngineStats") -> "EngineStats":
        """The counters of this engine and of those before it, without gauges."""
        counters = set(self.__struct_fields__) - _GAUGES
        return EngineStats(**{name: getattr(self, name) + getattr(past, name) for name in counters})


_GAUGES = {"running", "waiting", "blocks_used", "blocks_total", "vision_bytes"}


class StepReport(msgspec.Struct, frozen=True, tag="report"):
    """What one engine step produced."""

    outputs: list[EngineOutput]
    stats: EngineStats


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up progress: ``done`` of ``total`` units of ``stage``; total 0 means unknown."""

    stage: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can serve. Everything the front end must know about the model.

    ``max_model_len`` bounds prompt plus completion in tokens, and ``max_positions`` the positions
    that they take: the model was trained with no more. ``eos_token_ids`` end a turn; the
    engine stops at them only where a request has them among its stop ids.
    ``vocab_size`` bounds the ids the model accepts. ``vision_token_bytes`` is what one encoded
    picture token occupies (hidden size times element size); the vision cache counts with it.
    ``grammars`` says whether requests may have one, and ``speculates`` whether anybody asks what
    they predict.
    """

    geometry: VisionGeometry
    prompt_format: PromptFormat
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    blocks_total: int
    device: str
    dtype: str
    attention: str
    parameters: int
    max_positions: int
    vision_token_bytes: int = 0
    grammars: bool = False
    speculates: bool = False

    def context(self, saved: int = 0) -> int:
        """Tokens of the longest sequence whose pictures save so many positions."""
        return min(self.max_model_len, self.max_positions + saved)


class Fault(msgspec.Struct, frozen=True, tag="fault"):
    """The engine is about to exit: ``kind`` is "load" or "step", or "exit" where one of its
    processes has ended; ``text`` is for the log only.

    ``suspects`` are the requests that were being computed; one of them is likely the cause.
    """

    kind: str
    text: str
    suspects: list[str] = []


class Profiled(msgspec.Struct, frozen=True, tag="profiled"):
    """What was seen since the engine was told to watch; for operators, it names files. A page, or a
    gzipped Chrome trace; nothing where it could not be had."""

    seen: bytes


FromEngine = StepReport | Progress | Ready | Fault | Profiled
