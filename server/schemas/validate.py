"""From a request body to its form, or to an error that names the field as a client would write it
(``messages[0].content[1].image_url.url``) and what is allowed there. Nothing of the validator's own
words, class names or values reaches the client."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from server.schemas.form import Form, clip_name, take_unknown
from wire.errors import BodyTooLarge, Code, InvalidRequest

# Commas and opening brackets in JSON that is read: each can cost an object, and no other thread
# runs while they are made. A text that fits in a context has fewer.
MAX_MARKS = 1 << 16
_SLICE = 1 << 20

F = TypeVar("F", bound=Form)

_Sentence = Callable[[Mapping[str, Any]], str]

# type of a pydantic error -> what the client reads after the field's name
_SENTENCES: dict[str, _Sentence] = {
    "missing": lambda _: "is missing",
    "none_required": lambda _: "is not supported; leave it out",
    "string_type": lambda _: "must be a string",
    "int_type": lambda _: "must be an integer",
    "int_parsing": lambda _: "must be an integer",
    "int_parsing_size": lambda _: "is too large",
    "float_type": lambda _: "must be a number",
    "finite_number": lambda _: "must be a finite number",
    "bool_type": lambda _: "must be true or false",
    "list_type": lambda _: "must be an array",
    "dict_type": lambda _: "must be an object",
    "model_type": lambda _: "must be an object",
    "model_attributes_type": lambda _: "must be an object",
    "literal_error": lambda context: f"must be one of {context['expected']}",
    "greater_than_equal": lambda context: f"must be at least {context['ge']}",
    "greater_than": lambda context: f"must be greater than {context['gt']}",
    "less_than_equal": lambda context: f"must be at most {context['le']}",
    "less_than": lambda context: f"must be less than {context['lt']}",
    "too_long": lambda context: f"must not have more than {context['max_length']} entries",
    "too_short": lambda _: "must not be empty",
    "bytes_too_short": lambda _: "must not be empty",
    "string_too_short": lambda _: "must not be empty",
    "string_too_long": lambda context: (
        f"must not be longer than {context['max_length']} characters"
    ),
    "client": lambda context: str(context["message"]),
}


def parse_request(
    body: bytes | bytearray, form: type[F], strict: bool = False
) -> tuple[F, list[str]]:
    """Decode and check a body. Also gives the names of fields that nobody knows; where that is
    ``strict``, they are refused. Raises InvalidRequest."""
    return read_object(decode_object(body), form, strict)


def decode_object(body: bytes | bytearray) -> dict[str, Any]:
    """The object that a body is. Raises InvalidRequest."""
    try:
        raw = decode(body)
    except ValueError:
        raise InvalidRequest("The request body is not valid JSON.", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return raw


def read_object(raw: dict[str, Any], form: type[F], strict: bool) -> tuple[F, list[str]]:
    """The second half of ``parse_request``."""
    _check_refused(raw, form.refused)
    request = validated(form, raw)
    unknown = list(take_unknown(request))
    if strict and unknown:
        raise InvalidRequest(
            f"{unknown[0]} is unknown to this server; leave it out.",
            param=unknown[0],
            code="unknown_parameter",
        )
    return request, unknown


def validated(form: type[F], raw: Mapping[str, Any]) -> F:
    """``raw`` as ``form``. Raises InvalidRequest."""
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        raise _first(error) from None


def decode(text: bytes | bytearray | str) -> Any:
    """What a client's JSON says. Raises ValueError for what is none, and BodyTooLarge for what
    would keep the interpreter busy for long."""
    marks: tuple[Any, ...] = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    found = 0
    for start in range(0, len(text), _SLICE):
        found += sum(text.count(mark, start, start + _SLICE) for mark in marks)
        if found > MAX_MARKS:
            raise BodyTooLarge(
                f"The request body has more than {MAX_MARKS} commas and opening brackets."
            )
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("not JSON") from None


def _check_refused(raw: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    for name, neutral in refused.items():
        value = raw.get(name)
        if value is None or any(_same(value, allowed) for allowed in neutral):
            continue
        hint = " or ".join(msgspec.json.encode(allowed).decode() for allowed in neutral)
        raise InvalidRequest(
            f"{name} is not supported by this server; leave it out"
            + (f" or send {hint}." if hint else "."),
            param=name,
            code="unsupported_parameter",
        )


def _same(value: object, allowed: object) -> bool:
    # False equals 0 in Python, but not in JSON.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _first(error: ValidationError) -> InvalidRequest:
    details = error.errors(include_url=False, include_input=False)[0]
    context = details.get("ctx", {})
    path = ""
    for step in (*details["loc"], context.get("field", "")):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step and not step.startswith("<"):
            joint = "." if path and not step.startswith("[") else ""
            path += joint + clip_name(step)
    code: Code | None = "missing_required_parameter" if details["type"] == "missing" else None
    return InvalidRequest(f"{path} {what_is_wrong(details)}.", param=path, code=code)


def what_is_wrong(details: Mapping[str, Any]) -> str:
    """What the client reads of a pydantic error after the field's name."""
    sentence = _SENTENCES.get(details["type"])
    if sentence is None:
        return "has a value that is not allowed"
    return sentence(details.get("ctx", {}))
