"""docs/api.md says what the code does, and no field of the official client is forgotten."""

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from anthropic.types import message_count_tokens_params as official_counts
from anthropic.types import message_create_params as official_messages
from fastapi.routing import APIRoute
from openai.types import completion_create_params as official_completions
from openai.types.chat import completion_create_params as official_chat
from openai.types.responses import input_token_count_params as official_inputs
from openai.types.responses import response_create_params as official_responses

from server.admin import ProfileRunning  # noqa: F401  (an error that the tree has then)
from server.app import create_app
from server.auth import PROBES
from server.openapi import ROUTES
from server.routes import MODULES, web
from server.schemas.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, ChatRequest
from server.schemas.completion import MAX_TEXTS, CompletionRequest
from server.schemas.generation import MAX_STOP_LENGTH, MAX_STOPS, Generation
from server.schemas.messages import MessagesRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.tokens import MAX_CHARACTERS
from tests.fake_engine import FakeEngine, FakeMedia
from wire.errors import Code, ServiceError
from wire.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    section = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


FORMS: dict[str, type[Generation]] = {
    "chat": ChatRequest,
    "completions": CompletionRequest,
    "Anthropic's messages": MessagesRequest,
    "Responses": ResponsesRequest,
}


def fields(dialect: str) -> dict[str, str]:
    form = FORMS[dialect]
    # A dialect may refuse or ignore what others have.
    taken = form.model_fields.keys() - form.refused.keys() - form.ignored
    code = dict.fromkeys(taken, "supported")
    code |= dict.fromkeys(form.ignored, "ignored") | dict.fromkeys(form.refused, "refused")
    assert len(code) == len(taken) + len(form.ignored) + len(form.refused)
    return code


def test_every_field_has_exactly_the_row_that_the_code_gives_it() -> None:
    chat, completions = fields("chat"), fields("completions")
    table = rows("Fields of a request")
    documented = {name.strip("`"): (chat, completions) for name, chat, completions, *_ in table}
    assert len(documented) == len(table)
    assert documented == {
        name: (chat.get(name, "–"), completions.get(name, "–")) for name in {**chat, **completions}
    }


@pytest.mark.parametrize("dialect", ["Anthropic's messages", "Responses"])
def test_what_another_api_has_of_its_own_has_its_row(dialect: str) -> None:
    known = dict.fromkeys(Generation.model_fields, "supported")
    known |= dict.fromkeys(Generation.ignored, "ignored")
    known |= dict.fromkeys(Generation.refused, "refused")
    own = {name: kind for name, kind in fields(dialect).items() if known.get(name) != kind}
    assert {name.strip("`"): kind for name, kind, *_ in rows(dialect)} == own


@pytest.mark.parametrize(
    ("dialect", "official"),
    [
        ("Anthropic's messages", official_messages.MessageCreateParamsStreaming),
        ("Anthropic's messages", official_counts.MessageCountTokensParams),
        ("Responses", official_responses.ResponseCreateParamsStreaming),
        ("Responses", official_inputs.InputTokenCountParams),
    ],
)
def test_no_field_of_another_apis_client_is_forgotten(dialect: str, official: Any) -> None:
    hints = typing.get_type_hints(official)
    assert len(hints) > 8
    assert set(hints) <= set(fields(dialect))


@pytest.mark.parametrize(
    ("dialect", "official"),
    [("chat", official_chat), ("completions", official_completions)],
)
def test_no_field_of_the_official_client_is_forgotten(dialect: str, official: Any) -> None:
    found: set[str] = set()
    for params in typing.get_args(official.CompletionCreateParams):
        found |= set(typing.get_type_hints(params))
    assert len(found) > 15
    assert found <= set(fields(dialect))


def test_every_route_is_documented_with_its_need_of_a_key() -> None:
    documented = {route.strip("`"): key.split(",")[0] for route, _, key in rows("API")}
    served: dict[str, str] = {"GET /openapi.json": "yes"}
    for module in MODULES:
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods:
                path = route.path.replace(":path", "")
                is_open = path in PROBES or module is web
                served[f"{method} {path}"] = "no" if is_open else "yes"
    assert documented == served


def _errors(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _errors(below)


def test_every_code_of_an_error_is_documented_with_its_status() -> None:
    documented = [
        (int(status), code) for status, codes, _ in rows("Errors") for code in codes.split(", ")
    ]
    codes = [code.strip("`") for _, code in documented]
    assert len(set(codes)) == len(codes)
    assert sorted(codes) == sorted(typing.get_args(Code))
    types = set(
        re.findall("`([a-z_]+)`", PAGE.split("`type` is one of", 1)[1].split("codes", 1)[0])
    )
    for kind in _errors():
        if kind.__module__.startswith(("server.", "wire.", "preprocessing.")):
            assert kind.type in types | {"tokens"}, kind
            if "code" in vars(kind):
                assert (kind.status, f"`{kind.code}`") in documented, kind


def test_every_code_is_used() -> None:
    root = Path(__file__).parents[2]
    files = [p for name in ("server", "preprocessing", "wire") for p in (root / name).rglob("*.py")]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for code in typing.get_args(Code):
        assert text.count(f'"{code}"') > 1, code


def test_the_limits_in_the_text_are_those_of_the_code() -> None:
    text = re.sub(r"\s+", " ", PAGE)
    facts: list[Any] = [
        f"{MAX_MESSAGES} messages, {MAX_PARTS} parts",
        f"up to {MAX_STOPS} strings of up to {MAX_STOP_LENGTH} characters",
        f"up to {MAX_TOOLS} functions",
        f"array of up to {MAX_TEXTS} of either",
        f"up to {MAX_CHARACTERS} characters",
    ]
    for fact in facts:
        assert fact in text


def test_every_neutral_value_in_the_table_is_one() -> None:
    neutral = ChatRequest.refused | CompletionRequest.refused
    for name, *kinds, note in (row for row in rows("Fields of a request") if len(row) == 4):
        found = re.match(r"`?(.+?)`? is fine", note)
        if "refused" in kinds and found:
            values = [msgspec.json.encode(value).decode() for value in neutral[name.strip("`")]]
            assert found[1] in values, name


def test_every_route_says_what_it_takes_and_answers() -> None:
    app = create_app(Settings(), FakeEngine(), FakeMedia())
    page = app.openapi()
    described = {
        f"{method.upper()} {path}"
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
        if re.search(r"\$ref|binary", str(operation["responses"]["200"]["content"]))
    }
    routes = {f"{method.upper()} {path}" for path, ms in page["paths"].items() for method in ms}
    assert described == set(ROUTES)
    # What is left is for probes and browsers.
    assert {route for route in routes - described if not route.startswith("GET ")} == set()
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(page)))
    assert references <= set(page["components"]["schemas"])
    for name, schema in page["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "server." not in json.dumps(schema), name
