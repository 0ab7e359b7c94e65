"""What uploads say of a file, and what is answered of it: in OpenAI's form, and in Anthropic's."""

from typing import Annotated, Literal

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema

from server.schemas.form import Form

MAX_SECONDS = 30 * 86400

_File = Annotated[
    bytes, Field(min_length=1), WithJsonSchema({"type": "string", "format": "binary"})
]


def _number(value: object) -> object:
    """Fields of a form are texts."""
    is_number = isinstance(value, str) and value.isdecimal() and len(value) < 20
    return int(value) if is_number and isinstance(value, str) else value


_Seconds = Annotated[int, BeforeValidator(_number), Field(ge=1, le=MAX_SECONDS)]


class ExpiresAfter(Form):
    """How long a file shall be kept, if not as long as the server keeps it."""

    anchor: Literal["created_at"]
    seconds: _Seconds


class OpenAIUpload(Form):
    """POST /v1/files, as OpenAI's clients send it."""

    file: _File
    purpose: Literal["vision", "user_data"]
    expires_after: ExpiresAfter | None = None

    @property
    def seconds(self) -> int | None:
        """How long it shall be kept."""
        return None if self.expires_after is None else self.expires_after.seconds


class AnthropicUpload(Form):
    """POST /v1/files, as Anthropic's clients send it."""

    file: _File
    expires_in_seconds: _Seconds | None = None

    @property
    def purpose(self) -> str:
        """Nobody has asked for one."""
        return "user_data"

    @property
    def seconds(self) -> int | None:
        """How long it shall be kept."""
        return self.expires_in_seconds


class FileObject(msgspec.Struct):
    """A file in OpenAI's form; times are seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"
    status_details: None = None


class FileList(msgspec.Struct):
    """A page of files in OpenAI's form."""

    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class FileDeleted(msgspec.Struct):
    """DELETE /v1/files/{file_id} in OpenAI's form."""

    id: str
    object: str = "file"
    deleted: bool = True


class FileMetadata(msgspec.Struct):
    """A file in Anthropic's form; times are as in RFC 3339."""

    id: str
    filename: str
    mime_type: str
    size_bytes: int
    created_at: str
    expires_at: str
    downloadable: bool = True
    type: str = "file"


class FilePage(msgspec.Struct):
    """A page of files in Anthropic's form; ``next_page`` asks for the next one, and ``last_id``
    where the client is an earlier one."""

    data: list[FileMetadata]
    next_page: str | None
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedFile(msgspec.Struct):
    """DELETE /v1/files/{file_id} in Anthropic's form."""

    id: str
    type: str = "file_deleted"
