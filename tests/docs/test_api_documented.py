"""docs/api.md says what the code does, and no field of the official client is forgotten."""

import re
import typing
from pathlib import Path
from typing import Any

from fastapi.routing import APIRoute
from openai.types.chat import completion_create_params as official

from server.auth import PROBES
from server.routes import chat, models, ops, preview
from server.schemas.chat import MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, ChatRequest
from server.schemas.generation import MAX_STOP_LENGTH, MAX_STOPS

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    section = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_every_field_has_exactly_the_row_that_the_code_gives_it() -> None:
    code = dict.fromkeys(ChatRequest.model_fields, "supported")
    code |= dict.fromkeys(ChatRequest.ignored, "ignored") | dict.fromkeys(
        ChatRequest.refused, "refused"
    )
    assert len(code) == len(ChatRequest.model_fields) + len(ChatRequest.ignored) + len(
        ChatRequest.refused
    )
    table = rows("Fields of a chat request")
    documented = {name.strip("`"): kind for name, kind, *_ in table}
    assert len(documented) == len(table)
    assert documented == code


def test_no_field_of_the_official_client_is_forgotten() -> None:
    known = {*ChatRequest.model_fields, *ChatRequest.ignored, *ChatRequest.refused}
    fields: set[str] = set()
    for params in typing.get_args(official.CompletionCreateParams):
        fields |= set(typing.get_type_hints(params))
    assert len(fields) > 30
    assert fields <= known


def test_every_route_is_documented_with_its_need_of_a_key() -> None:
    documented = {route.strip("`"): key.split(",")[0] for route, _, key in rows("API")}
    served: dict[str, str] = {"GET /openapi.json": "yes"}
    for module in (chat, preview, models, ops):
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods:
                path = route.path.replace(":path", "")
                served[f"{method} {path}"] = "no" if path in PROBES else "yes"
    assert documented == served


def test_the_limits_in_the_text_are_those_of_the_code() -> None:
    text = re.sub(r"\s+", " ", PAGE)
    facts: list[Any] = [
        f"{MAX_MESSAGES} messages, {MAX_PARTS} parts",
        f"up to {MAX_STOPS} strings of up to {MAX_STOP_LENGTH} characters",
        f"up to {MAX_TOOLS} functions",
    ]
    for fact in facts:
        assert fact in text


def test_every_neutral_value_in_the_table_is_one() -> None:
    for name, kind, note in (row for row in rows("Fields of a chat request") if len(row) == 3):
        found = re.match(r"`?(.+?)`? is fine", note)
        if kind == "refused" and found:
            values = [
                str(value).lower().replace("'", '"')
                for value in ChatRequest.refused[name.strip("`")]
            ]
            assert found[1] in values, name
