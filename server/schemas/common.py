"""Outgoing structures that several routes share. They are msgspec structs, because one of them is
written per token; a test checks them against the official client's models."""

import msgspec


class PromptTokensDetails(msgspec.Struct):
    """``cached_tokens`` were not computed again; ``image_tokens`` stand for pictures."""

    cached_tokens: int
    image_tokens: int


class PartUsage(msgspec.Struct, kw_only=True):
    """One picture or video of a request. ``width`` and ``height`` are its own, upright; ``tiles``
    include thumbnails, ``tokens`` are those that the tiles take, and ``cached_tokens`` of them
    were not computed again. One that is ``reduced`` got less than it asked for. Times are in
    milliseconds, 0 for what was found in a cache: from its URL to its bytes, from these to tiles,
    and in the encoder."""

    index: int
    width: int
    height: int
    tiles: int
    tokens: int
    reduced: bool = False
    cached_tokens: int = 0
    fetch_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0


class ImageUsage(PartUsage, kw_only=True):
    """A picture; ``grid`` is columns, then rows."""

    grid: tuple[int, int]


class VideoUsage(PartUsage, kw_only=True):
    """A video: the numbers of the ``frames`` that were shown and their ``seconds`` from its
    beginning. ``source_frames``, ``duration`` in seconds and average ``fps`` are its own; one that
    was given as pictures has no times."""

    frames: list[int]
    seconds: list[float]
    source_frames: int | None = None
    duration: float | None = None
    fps: float | None = None


class MediaUsage(msgspec.Struct, omit_defaults=True):
    """What each picture and each video of a request took, in their order. ``v2pe_delta`` is how
    many positions each of their tokens takes, if that is not 1."""

    images: list[ImageUsage]
    videos: list[VideoUsage]
    v2pe_delta: float | None = None


class BestOfUsage(msgspec.Struct):
    """What of a request with best_of belongs to whom. ``candidate_tokens`` are all that were
    generated, ``winner_tokens`` those of the answer; further candidates found ``shared_tokens`` of
    their prompts in the cache. ``critic_tokens`` were read by a model of its own,
    ``critic_cached_tokens`` of these found in its cache; they count nowhere else."""

    candidate_tokens: int
    winner_tokens: int
    shared_tokens: int
    critic_tokens: int
    critic_cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of one request. The token that ended the answer counts as generated. ``internvl`` is
    there if the request has pictures or videos, ``best_of`` if it asked for that."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    internvl: MediaUsage | msgspec.UnsetType = msgspec.UNSET
    best_of: BestOfUsage | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, gc=False):
    """A token that might have come; ``bytes`` is what it adds to the text, an array of integers
    that was encoded once for all its appearances."""

    token: str
    logprob: float
    bytes: msgspec.Raw


class TokenLogprob(TopLogprob, gc=False):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, gc=False):
    """Of each token of an answer, in order."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct, gc=False):
    """A token at some place of the prompt; ``rank`` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


class ErrorDetail(msgspec.Struct):
    """What the OpenAI envelope holds; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The OpenAI error envelope."""

    error: ErrorDetail


class AnthropicDetails(msgspec.Struct):
    """What the OpenAI envelope says more; Anthropic's client reads ``error_code``."""

    error_code: str
    param: str | None


class AnthropicDetail(msgspec.Struct):
    """What the Anthropic envelope holds."""

    type: str
    message: str
    details: AnthropicDetails


class AnthropicError(msgspec.Struct, tag="error"):
    """The Anthropic error envelope."""

    error: AnthropicDetail
    request_id: str


class LoadProgress(msgspec.Struct):
    """Of a start: ``done`` of ``total`` units of ``stage``; total 0 means unknown."""

    stage: str
    done: int
    total: int


class Health(msgspec.Struct, omit_defaults=True):
    """Of a probe; ``reason`` says why the status is none of "live", "started" and
    "ready"."""

    status: str
    reason: str = ""
    progress: LoadProgress | None = None


class Version(msgspec.Struct):
    """/version."""

    version: str


class Aborted(msgspec.Struct):
    """DELETE /v1/requests/{name}."""

    id: str
    object: str = "request"
    aborted: bool = True


class Model(msgspec.Struct):
    """An entry of /v1/models: OpenAI's clients and Anthropic's each read their own fields."""

    id: str
    created: int
    max_model_len: int
    display_name: str
    created_at: str
    max_input_tokens: int
    object: str = "model"
    owned_by: str = "internvl-server"
    type: str = "model"
    lifecycle: str = "active"


class ModelList(msgspec.Struct):
    """/v1/models. There is one page."""

    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool = False
    object: str = "list"
