"""What every request body is made of: fields that are taken as they are, errors whose message is
written for the client, and the names of fields that have no meaning here."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


class Form(BaseModel):
    """An object of a request. Unknown fields are kept until ``take_unknown``, without effect."""

    # Values are taken as they are: "1" is no number.
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that are known and have no effect: bookkeeping, hints, and knobs of what this server
    does not have."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of a whole request that would change the answer and are not implemented, each with the
    values that ask for nothing. null always asks for nothing."""


def take_unknown(form: Form, path: str = "") -> Iterator[str]:
    """Take out what a client sent and nobody here knows, and yield the paths. What is null asks for
    nothing and is not told."""
    extra = form.model_extra or {}
    for name, value in extra.items():
        known = name in form.ignored or name in form.refused
        if value is not None and not known:
            yield f"{path}{clip_name(name)}"
    extra.clear()
    fields = type(form).model_fields
    for name in form.model_fields_set & fields.keys():
        value = getattr(form, name)
        here = f"{path}{fields[name].alias or name}"
        if isinstance(value, Form):
            yield from take_unknown(value, f"{here}.")
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, Form):
                    yield from take_unknown(entry, f"{here}[{number}].")


class OrText:
    """Says in a schema that a text may stand for a value, which a validator makes of it."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


def wrong(message: str, field: str = "") -> PydanticCustomError:
    """An error whose message is written for the client; ``field`` is appended to its path."""
    return PydanticCustomError("client", "{message}", {"message": message, "field": field})


def one_of(*kinds: str) -> Callable[[object], object]:
    """A check, before anything else, that a value is an object with one of these types."""
    *others, last = map(repr, kinds)
    supported = f"are {', '.join(others)} and {last}" if others else f"is {last}"

    def check(value: object) -> object:
        if not isinstance(value, dict):
            raise wrong("must be an object with a 'type'")
        kind = value.get("type")
        if kind not in kinds:
            found = clip(kind) if "type" in value else "missing"
            raise wrong(f"is {found}; supported {supported}", "type")
        return value

    return check


def tag_of(value: object) -> str:
    """What tells the forms of a union apart, sent or read. In angle brackets, so that it can be
    told from field names in an error's path."""
    return f"<{value['type'] if isinstance(value, dict) else getattr(value, 'type', '')}>"


def clip(value: object) -> str:
    """A client's own value, short enough to be repeated in a message."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:60] + "…")


def clip_name(name: str) -> str:
    """A field's name, short enough to be repeated."""
    return name if len(name) <= 60 else clip(name)
