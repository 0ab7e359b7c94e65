"""From a request's fields to the sampling parameters of the engine, with every check that a client
can fail."""

import dataclasses
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from server.chat.visual import listed
from server.schemas.generation import MAX_PROMPT_LOGPROBS, Generation
from server.tokenizer import Tokenizer
from wire.errors import ContextTooLong, InvalidRequest
from wire.messages import Ready
from wire.sampling import MAX_SEED, SamplingParams

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Sampling where a request says nothing: the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def load(cls, folder: Path) -> "Defaults":
        """Read the file; without one, or with a strange one, OpenAI's defaults."""
        try:
            raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
            found = cls(
                temperature=float(raw.get("temperature") or 1.0) if raw.get("do_sample") else 0.0,
                top_p=float(raw.get("top_p") or 1.0),
                top_k=int(raw.get("top_k") or 0),
            )
            if "do_sample" not in raw:
                found = dataclasses.replace(found, temperature=float(raw.get("temperature") or 1.0))
            SamplingParams(found.temperature, found.top_p, found.top_k).check()
        except (OSError, ValueError, TypeError, AttributeError, InvalidRequest):
            return cls()
        return found


def either(value: _T | None, default: _T) -> _T:
    """What was sent, or else the default."""
    return default if value is None else value


def read_sampling(
    request: Generation, defaults: Defaults, ready: Ready, tokenizer: Tokenizer
) -> SamplingParams:
    """Everything but the length, which depends on the prompt. Raises InvalidRequest."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_ids(name, getattr(request, name) or (), ready.vocab_size)
    eos = () if request.ignore_eos else ready.eos_token_ids
    sampling = SamplingParams(
        temperature=either(request.temperature, defaults.temperature),
        top_p=either(request.top_p, defaults.top_p),
        top_k=max(either(request.top_k, defaults.top_k), 0),  # vLLM writes "all" as -1
        min_p=either(request.min_p, 0.0),
        seed=either(request.seed, secrets.randbelow(MAX_SEED)),
        stop_token_ids=tuple(dict.fromkeys((*eos, *(request.stop_token_ids or ())))),
        repetition_penalty=either(request.repetition_penalty, 1.0),
        presence_penalty=either(request.presence_penalty, 0.0),
        frequency_penalty=either(request.frequency_penalty, 0.0),
        logit_bias=tuple((request.logit_bias or {}).items()),
        bad_words=_bad_words(request.bad_words or (), tokenizer),
        allowed_token_ids=tuple(request.allowed_token_ids or ()),
        logprobs=request.likeliest,
        prompt_logprobs=request.prompt_likeliest,
    )
    sampling.check()
    return sampling


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise InvalidRequest for an entry of the field ``name`` that is no token's id."""
    for number, token in enumerate(ids):
        if token >= vocab_size:
            where = f"{name}[{token if name == 'logit_bias' else number}]"
            raise InvalidRequest(f"{where}: token ids must be less than {vocab_size}.", param=where)


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at the beginning of a text and behind a space."""
    spelled = (tokenizer.encode(text) for word in words for text in (word, " " + word.lstrip()))
    return tuple(dict.fromkeys(tuple(ids) for ids in spelled if ids))


def fit_sampling(
    sampling: SamplingParams,
    request: Generation,
    length: int,
    context: int,
    visual: Sequence[int] = (),
) -> SamplingParams:
    """For a prompt of ``length`` tokens, ``visual`` of them for each picture and video: with as
    many tokens as were asked for, or else as many as fit in ``context``. Raises ContextTooLong,
    and InvalidRequest for what cannot be answered."""
    room = context - length
    shown = f", {listed(visual)} of them for pictures and videos," if visual else ""
    name, asked = request.length
    if room < 1:
        raise ContextTooLong(
            context,
            f"the prompt is too long: it has {length} tokens{shown} and at least one must be left "
            f"for the answer: {1 - room} too many.",
            param=request.prompt_field,
        )
    if asked is not None and asked > room and not request.shortens:
        raise ContextTooLong(
            context,
            f"the prompt has {length} tokens{shown} and {name} is {asked}, together more than "
            f"that: {name} can be {room} here.",
            param=name,
        )
    most = min(room, request.usual_length or room) if asked is None else max(min(asked, room), 1)
    least = either(request.min_tokens, 0)
    if least > most:
        raise InvalidRequest(f"min_tokens must be at most {most} here.", param="min_tokens")
    sampling = msgspec.structs.replace(sampling, max_tokens=most, min_tokens=least)
    _check_possible(sampling)
    _check_prompt_logprobs(sampling, length)
    return sampling


def _check_possible(sampling: SamplingParams) -> None:
    """Raise InvalidRequest where no first token may be drawn. Contradictions that only come up
    later end the answer with an error then."""
    left = set(sampling.allowed_token_ids)
    if not left:
        return
    fields = ["allowed_token_ids"]
    for name, removed in (
        ("bad_words", {word[0] for word in sampling.bad_words if len(word) == 1}),
        ("min_tokens", set(sampling.stop_token_ids) if sampling.min_tokens else set[int]()),
    ):
        if left & removed:
            fields.append(name)
            left -= removed
    if not left:
        raise InvalidRequest(
            f"{' and '.join(fields)} contradict each other: no token is left to begin with.",
            param="allowed_token_ids",
        )


def _check_prompt_logprobs(sampling: SamplingParams, length: int) -> None:
    """Raise InvalidRequest where they would be too many."""
    asked = length * (sampling.prompt_logprobs + 1)
    if asked > MAX_PROMPT_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs: {length} tokens with {sampling.prompt_logprobs} likeliest "
            f"of each are {asked} entries; at most {MAX_PROMPT_LOGPROBS} are reported.",
            param="prompt_logprobs",
        )
