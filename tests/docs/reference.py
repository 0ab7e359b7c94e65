"""docs/api-reference.md, from what /openapi.json says:
``python -m tests.docs.reference > docs/api-reference.md``."""

import re
import sys
from collections.abc import Iterator
from html import unescape
from typing import Any

from server.app import create_app
from server.reference import operation_rows, schema_rows, type_of
from tests.fake_engine import FakeEngine, FakeMedia
from wire.settings import Settings

_HEAD = """\
# API reference
Written by `python -m tests.docs.reference` from the description that a server gives at
`/openapi.json`; a test keeps it current. What routes and fields mean is in [the API](api.md). A
running server shows the same at `/docs`.

## Routes
"""


def reference() -> str:
    """The page."""
    page = create_app(Settings(), FakeEngine(), FakeMedia()).openapi()
    return _HEAD + "\n".join(_lines(page)) + "\n"


def _lines(page: dict[str, Any]) -> Iterator[str]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield from ("", f"### {method.upper()} {path}", _text(operation.get("description", "")))
            yield from _table(
                ("", "in", "type"),
                ((name, f"`{where}`", type_) for name, where, type_ in operation_rows(operation)),
            )
    yield from ("", "## Schemas")
    for name, schema in sorted(page["components"]["schemas"].items()):
        yield from ("", f"### {name}", _text(schema.get("description", "")))
        if "properties" in schema:
            rows = ((f"`{field}`", type_, need) for field, type_, need in schema_rows(schema))
            yield from _table(("field", "type", ""), rows)
        else:
            yield from ("", _markdown(type_of(schema)))


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, str, str]]) -> Iterator[str]:
    yield from ("", _row(head), "|" + "---|" * len(head))
    for row in rows:
        yield _row(tuple(_markdown(cell).replace("|", r"\|") for cell in row))


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


def _markdown(html: str) -> str:
    """Links, code and dimmed text are all the tags there are."""
    html = re.sub(
        r'<a href="#schema-[^"]+">(.*?)</a>', lambda m: f"[{m[1]}](#{m[1].lower()})", html
    )
    return unescape(re.sub("</?code>", "`", re.sub("</?span[^>]*>", "", html)))


if __name__ == "__main__":
    sys.stdout.write(reference())
