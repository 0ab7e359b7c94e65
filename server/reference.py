"""The page /docs: what /openapi.json says, to be read by people. One file of plain HTML without
scripts, so that it can be kept, read offline, and loads nothing from anywhere."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8885; --dim: #8888; --mark: #0a7; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code { font: .9em ui-monospace, monospace; }
a { color: inherit; text-decoration-color: var(--dim); }
nav ul { list-style: none; padding: 0; columns: 22rem; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
section:target h2, section:target h3 { color: var(--mark); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
td { border-top: 1px solid var(--line); }
td:first-child { width: 14rem; }
.method { color: var(--mark); margin-right: .5rem; }
.dim { color: var(--dim); }
"""
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Keyword of a schema -> how it is read behind a type.
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "maxProperties": "at most {} entries",
}


def reference(page: dict[str, Any]) -> str:
    """The page for an OpenAPI description. All text in it is escaped."""
    title = escape(page["info"]["title"])
    operations = [
        (method.upper(), path, operation)
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = sorted(page["components"]["schemas"].items())
    body = [
        f"<h1>{title}</h1>",
        '<p>This page is made from <a href="openapi.json">openapi.json</a>.</p>',
        "<nav><ul>",
        *(_link(method, path) for method, path, _ in operations),
        "</ul></nav><main>",
        *(part for operation in operations for part in _operation(*operation)),
        "<h2>Schemas</h2>",
        *(part for name, schema in schemas for part in _schema(name, schema)),
        "</main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )


def _anchor(*names: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", "-".join(names)).strip("-")


def _link(method: str, path: str) -> str:
    name = f'<span class="method">{method}</span><code>{escape(path)}</code>'
    return f'<li><a href="#{_anchor(method, path)}">{name}</a></li>'


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f'<section id="{_anchor(method, path)}">'
    yield f'<h2><span class="method">{method}</span><code>{escape(path)}</code></h2>'
    yield _text(operation.get("description", ""))
    yield "<table>"
    for name, where, type_ in operation_rows(operation):
        yield f"<tr><td>{name}<td><code>{where}</code><td>{type_}</tr>"
    yield "</table></section>"


def operation_rows(operation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, place and type, as HTML, of what a route takes and answers."""
    for each in operation.get("parameters", ()):
        yield escape(each["name"]), f"in the {each['in']}", type_of(each["schema"])
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield "body", kind, type_of(content["schema"])
    for status, answer in operation["responses"].items():
        name = "errors" if status == "default" else status
        for kind, content in answer.get("content", {}).items():
            yield name, kind, type_of(content.get("schema", {}))


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f'<section id="{_anchor("schema", name)}"><h3>{escape(name)}</h3>'
    yield _text(schema.get("description", ""))
    if "properties" not in schema:
        yield f"<p>{type_of(schema)}</p></section>"
        return
    yield "<table>"
    for field, type_, need in schema_rows(schema):
        yield f'<tr><td><code>{field}</code><td>{type_}<td class="dim">{need}</tr>'
    yield "</table></section>"


def schema_rows(schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, type, and whether it is needed, as HTML, of the fields of an object."""
    required = schema.get("required", ())
    for field, kind in schema["properties"].items():
        need = "required" if field in required else ""
        default = kind.get("default")
        if default is not None:
            need = f"default: <code>{escape(str(default))}</code>"
        yield escape(field), type_of(kind), need


def _text(text: str) -> str:
    """A docstring."""
    return "<p>" + re.sub("``(.+?)``", r"<code>\1</code>", escape(text)) + "</p>"


def type_of(schema: dict[str, Any]) -> str:
    """A type in a line of HTML, with links to the schemas that it names."""
    reference = schema.get("$ref")
    if reference is not None:
        name = reference.rsplit("/", 1)[1]
        return f'<a href="#{_anchor("schema", name)}">{escape(name)}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(type_of, schema[several])))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = escape(str(schema.get("type", "anything")))
    if kind == "array" and schema.get("prefixItems"):
        kind = "array of " + ", ".join(map(type_of, schema["prefixItems"]))
    elif kind == "array":
        kind = f"array of {type_of(schema.get('items') or {})}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {type_of(schema['additionalProperties'])}"
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return kind + "".join(f', <span class="dim">{escape(bound)}</span>' for bound in bounds)
