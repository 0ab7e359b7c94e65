"""What /openapi.json says of bodies, which are validated and written by hand, not by FastAPI."""

import dataclasses
from typing import Any

import msgspec
from fastapi import FastAPI

from server.schemas import response
from server.schemas.answer import Chunk, Completion
from server.schemas.chat import ChatRequest
from server.schemas.common import (
    Aborted,
    AnthropicError,
    ErrorBody,
    Health,
    Model,
    ModelList,
    Version,
)
from server.schemas.completion import CompletionRequest, TextCompletion
from server.schemas.files import (
    AnthropicUpload,
    DeletedFile,
    FileDeleted,
    FileList,
    FileMetadata,
    FileObject,
    FilePage,
    OpenAIUpload,
)
from server.schemas.form import Form
from server.schemas.info import ServerInfo
from server.schemas.message import AnthropicMessage, Event, TokenCount
from server.schemas.messages import CountRequest, MessagesRequest
from server.schemas.preview import Preview, Render
from server.schemas.response import InputItems, InputTokens, ResponseDeleted, ResponseObject
from server.schemas.responses import ResponsesRequest
from server.schemas.tokens import DetokenizeRequest, Text, TokenizeChat, TokenizeText, Tokens

_REF = "#/components/schemas/{}"


@dataclasses.dataclass(frozen=True)
class Described:
    """The forms that a route's body may have, what it answers, and the events of its stream;
    ``answer`` is None where there is no other answer. ``anthropic`` is the answer to Anthropic's
    clients, where both have the route. ``encoding`` is that of the forms; a route whose ``answer``
    is None may answer ``binary`` data."""

    answer: type[msgspec.Struct] | None
    forms: tuple[type[Form], ...] = ()
    events: tuple[type[msgspec.Struct], ...] = ()
    error: type[msgspec.Struct] = ErrorBody
    anthropic: type[msgspec.Struct] | None = None
    encoding: str = "application/json"
    binary: bool = False

    @property
    def answers(self) -> tuple[type[msgspec.Struct], ...]:
        """To clients of either API."""
        return tuple(each for each in (self.answer, self.anthropic) if each is not None)

    @property
    def errors(self) -> tuple[type[msgspec.Struct], ...]:
        """Likewise."""
        return (self.error,) if self.anthropic is None else (self.error, AnthropicError)


ROUTES: dict[str, Described] = {
    "POST /v1/chat/completions": Described(Completion, (ChatRequest,), (Chunk,)),
    "POST /v1/completions": Described(TextCompletion, (CompletionRequest,), (TextCompletion,)),
    "POST /v1/messages": Described(
        AnthropicMessage, (MessagesRequest,), Event.__args__, AnthropicError
    ),
    "POST /v1/messages/count_tokens": Described(TokenCount, (CountRequest,), error=AnthropicError),
    "POST /v1/responses": Described(ResponseObject, (ResponsesRequest,), response.Event.__args__),
    "POST /v1/responses/input_tokens": Described(InputTokens, (ResponsesRequest,)),
    "GET /v1/responses/{response_id}": Described(ResponseObject, events=response.Event.__args__),
    "POST /v1/responses/{response_id}/cancel": Described(ResponseObject),
    "GET /v1/responses/{response_id}/input_items": Described(InputItems),
    "DELETE /v1/responses/{response_id}": Described(ResponseDeleted),
    "POST /v1/internvl/preview": Described(Preview, (ChatRequest,)),
    "POST /v1/chat/completions/render": Described(Render, (ChatRequest,)),
    "POST /tokenize": Described(Tokens, (TokenizeText, TokenizeChat)),
    "POST /detokenize": Described(Text, (DetokenizeRequest,)),
    "POST /v1/files": Described(
        FileObject,
        (OpenAIUpload, AnthropicUpload),
        anthropic=FileMetadata,
        encoding="multipart/form-data",
    ),
    "GET /v1/files": Described(FileList, anthropic=FilePage),
    "GET /v1/files/{file_id}": Described(FileObject, anthropic=FileMetadata),
    "GET /v1/files/{file_id}/content": Described(None, binary=True),
    "DELETE /v1/files/{file_id}": Described(FileDeleted, anthropic=DeletedFile),
    "DELETE /v1/requests/{name}": Described(Aborted),
    "GET /v1/chat/completions/{name}/events": Described(None, events=(Chunk,)),
    "GET /v1/completions/{name}/events": Described(None, events=(TextCompletion,)),
    "GET /v1/messages/{name}/events": Described(None, events=Event.__args__, error=AnthropicError),
    "GET /server_info": Described(ServerInfo),
    "GET /version": Described(Version),
    "GET /live": Described(Health),
    "GET /started": Described(Health, error=Health),
    "GET /ready": Described(Health, error=Health),
    "GET /health": Described(Health, error=Health),
    "GET /v1/models": Described(ModelList),
    "GET /v1/models/{model}": Described(Model),
}


def describe(app: FastAPI) -> None:
    """Let ``app`` say so."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_bodies(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_bodies(page: dict[str, Any]) -> dict[str, Any]:
    structs = {s for d in ROUTES.values() for s in (*d.answers, *d.errors, *d.events)}
    _, schemas = msgspec.json.schema_components(
        sorted(structs, key=lambda struct: struct.__name__),
        ref_template=_REF.format("{name}"),
    )
    for described in ROUTES.values():
        for form in described.forms:
            schema = form.model_json_schema(ref_template=_REF.format("{model}"))
            schemas |= schema.pop("$defs", {}) | {form.__name__: schema}
    page.setdefault("components", {})["schemas"] = schemas
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            found = ROUTES.get(f"{method.upper()} {path}")
            answers = operation["responses"]
            answers.pop("422", None)  # FastAPI's own, which is never sent
            if found is not None:
                answers["200"]["content"] = _content(found)
                if found.forms:
                    body = {found.encoding: {"schema": _any_of(found.forms)}}
                    operation["requestBody"] = {"required": True, "content": body}
            errors = found.errors if found else (ErrorBody,)
            error = {"application/json": {"schema": _any_of(errors)}}
            answers["default"] = {"description": "Refused, or failed", "content": error}
    return page


def _content(described: Described) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if described.answers:
        content["application/json"] = {"schema": _any_of(described.answers)}
    if described.binary:
        schema = {"type": "string", "format": "binary"}
        content["application/octet-stream"] = {"schema": schema}
    if described.events:
        # Of each event but [DONE], which is OpenAI's last.
        content["text/event-stream"] = {"schema": _any_of(described.events)}
    return content


def _any_of(types: tuple[type, ...]) -> dict[str, Any]:
    references = [{"$ref": _REF.format(each.__name__)} for each in types]
    return references[0] if len(references) == 1 else {"anyOf": references}
