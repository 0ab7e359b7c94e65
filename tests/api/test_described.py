"""What /openapi.json says is so: schemathesis makes requests of it, good and bad ones, and every
answer has a status, a type and a form that it knows."""

import json
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import create_app
from tests.api.conftest import House
from tests.fake_engine import FakeEngine, FakeMedia
from wire.settings import Settings

PAGE = create_app(Settings(), FakeEngine(), FakeMedia()).openapi()
FOUND = [found.ok() for found in schemathesis.openapi.from_dict(PAGE).get_all_operations()]
OPERATIONS = {f"{operation.method.upper()} {operation.path}": operation for operation in FOUND}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


GOOD_AND_BAD = [(route, GenerationMode.POSITIVE) for route in OPERATIONS]
# Nothing can be wrong with a request that has no body.
GOOD_AND_BAD += [(route, GenerationMode.NEGATIVE) for route in OPERATIONS if OPERATIONS[route].body]


@pytest.mark.parametrize(("route", "mode"), GOOD_AND_BAD, ids=str)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_every_answer_is_as_it_is_described(
    house: House, route: str, mode: GenerationMode, data: st.DataObject
) -> None:
    case = data.draw(OPERATIONS[route].as_strategy(generation_mode=mode))
    case.validate_response(await send(house, case), checks=CHECKS)


def form(body: Any) -> bytes:
    """A form of what was drawn; what cannot be in one is none."""
    if not isinstance(body, dict):
        return str(body).encode()
    part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    fields = dict(body)
    nested = fields.pop("expires_after", None)
    inner = nested if isinstance(nested, dict) else {"anchor": nested}
    fields |= {f"expires_after[{name}]": value for name, value in inner.items() if nested}
    pairs = [
        (name.encode(errors="replace"), value if isinstance(value, bytes) else str(value).encode())
        for name, value in fields.items()
        if value is not None
    ]
    return b"".join(part % pair for pair in pairs) + b"--b--\r\n"


async def send(house: House, case: Any) -> httpx.Response:
    body, headers = case.body, dict(case.headers)
    if case.media_type == "multipart/form-data" and body is not NOT_SET:
        headers["Content-Type"] = "multipart/form-data; boundary=b"
        body = form(body)
    elif body is not NOT_SET:
        headers["Content-Type"] = case.media_type
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await house.http.request(
        case.method,
        case.formatted_path,
        headers=headers,
        params=case.query,
        content=None if body is NOT_SET else body,
    )


TEXT = {"role": "user", "content": "Hello!"}
PICTURE = {"type": "image_url", "image_url": "data:image/png;base64,a"}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [TEXT], "stop": "red", "guided_json": "{}"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [PICTURE]}]}),
    ("/v1/chat/completions", {"messages": [TEXT], "logit_bias": {"5": 1}, "unknown": {}}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": [1, 2]}),
    ("/v1/completions", {"prompt": ["a", [1]]}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 9, "messages": [TEXT], "system": "Be kind."}),
    ("/v1/responses", {"model": "tiny", "input": "Hello!"}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", {"messages": [TEXT]}),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
async def test_the_short_forms_that_are_taken_are_described(
    house: House, path: str, body: dict[str, Any]
) -> None:
    assert (await house.http.post(path, json=body)).status_code == 200
    content = PAGE["paths"][path]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"] | {"components": PAGE["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
