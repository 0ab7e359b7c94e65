"""/v1/files: pictures and videos that are uploaded once and asked about many times. Two APIs have
these routes; Anthropic's clients are known by their ``anthropic-version``."""

import asyncio
import datetime
import logging
import re
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Send

from preprocessing.media import File, PictureFacts
from server.auth import Tenant
from server.chat.sse import unless_gone
from server.cors import OriginRefused
from server.errors import is_anthropic
from server.files import Upload, no_file
from server.lifecycle import Service
from server.multipart import FILE, UploadForm, read_upload
from server.routes.body import check_unpacked, whole
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
from server.schemas.validate import read_object
from wire.digest import content_digest
from wire.errors import InvalidRequest, NotFound

logger = logging.getLogger(__name__)

router = APIRouter()

PIECE = 64 << 10  # bytes of a file that are sent at a time
_PAGE = re.compile(r"page_[0-9]+\.[0-9]+")
_NESTED = re.compile(r"(\w+)\[(\w+)\]")
# Formats that clients know; the others are bytes.
_TYPES = {name: f"image/{name.lower()}" for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
_TYPES |= {"AVIF": "image/avif", "HEIF": "image/heif", "MPO": "image/jpeg"}
_TYPES |= {"mp4": "video/mp4", "matroska": "video/x-matroska", "avi": "video/x-msvideo"}
_BYTES = "application/octet-stream"


@router.post("/v1/files")
async def upload_file(request: Request) -> Response:
    """Keep a picture or a video, to be asked about by its id."""
    service: Service = request.app.state.service
    _check_origin(request, service.settings.server.cors_origins)
    check_unpacked(request)
    async with service.preparing(), service.media.arriving() as room:
        most = min(
            service.settings.server.max_file_bytes,
            service.files.most_bytes,
            service.media.most_arriving,
        )
        content_type = request.headers.get("content-type", "")
        form = await read_upload(content_type, request.stream(), most, room)
        return await unless_gone(request.receive, _keep(request, service, form))


def _check_origin(request: Request, allowed: Sequence[str]) -> None:
    """Browsers send forms for any page without asking us first. Raises OriginRefused."""
    origin = request.headers.get("origin")
    if origin is not None and not {"*", origin} & set(allowed):
        raise OriginRefused("Pages of this origin may not send files to this server.")


async def _keep(request: Request, service: Service, form: UploadForm) -> Response:
    raw: dict[str, Any] = dict(form.fields)
    for name in form.fields:
        nested = _NESTED.fullmatch(name)
        if nested and nested[1] not in (FILE, *form.fields):
            raw.setdefault(nested[1], {})[nested[2]] = raw.pop(name)
    if form.file is not None:
        raw[FILE] = form.file
    strict = service.settings.server.strict_fields
    asked: OpenAIUpload | AnthropicUpload
    if is_anthropic(request.scope):
        asked, unknown = read_object(raw, AnthropicUpload, strict)
    else:
        asked, unknown = read_object(raw, OpenAIUpload, strict)
    with service.metrics.counting_refusals():
        kind, facts = await service.media.identify(asked.file, FILE)
    file = File(asked.file, await asyncio.to_thread(content_digest, asked.file))
    tenant: Tenant = request.state.tenant
    upload = service.files.put(
        tenant.id,
        tenant.account.name,
        file,
        (kind, facts.format if isinstance(facts, PictureFacts) else facts.container),
        form.filename,
        asked.purpose,
        asked.seconds,
    )
    return whole(_described(request, upload), unknown)


@router.get("/v1/files")
async def list_files(
    request: Request,
    limit: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    after_id: str | None = None,
    before_id: None = None,
    purpose: str | None = None,
    page: str | None = None,
    ids: Annotated[list[str] | None, Query(alias="ids[]")] = None,
) -> Response:
    """The files of this API key, the newest first. ``after``, or ``after_id`` for Anthropic's
    earlier clients, is the id of the last one of the page before, and ``page`` its
    ``next_page``."""
    service: Service = request.app.state.service
    found = service.files.all(request.state.tenant.id)
    if order == "desc":
        found.reverse()
    last: float | None = None
    if page is not None:
        last = _read_page(page)
    elif after is not None:
        last = _created(found, after, "after")
    elif after_id is not None:
        last = _created(found, after_id, "after_id")
    wanted = None if ids is None else set(ids)
    found = [
        upload
        for upload in found
        if purpose in (None, upload.purpose)
        and (wanted is None or upload.id in wanted)
        and (
            last is None
            or (last > upload.created_at if order == "desc" else last < upload.created_at)
        )
    ]
    most = limit or (20 if is_anthropic(request.scope) and ids is None else 10_000)
    has_more, found = len(found) > most, found[:most]
    first_id, last_id = (found[0].id, found[-1].id) if found else (None, None)
    if is_anthropic(request.scope):
        next_page = _page(found[-1]) if has_more else None
        files = [_metadata(one) for one in found]
        return whole(FilePage(files, next_page, has_more, first_id, last_id), ())
    objects = [_object(upload) for upload in found]
    return whole(FileList(objects, has_more, first_id, last_id), ())


def _created(found: Sequence[Upload], name: str, param: str) -> float:
    for upload in found:
        if upload.id == name:
            return upload.created_at
    raise no_file(param)


def _page(last: Upload) -> str:
    """What names the page behind ``last``, even when that is gone: some clients delete what they
    list."""
    return f"page_{last.created_at!r}"


def _read_page(name: str) -> float:
    if not _PAGE.fullmatch(name):
        raise InvalidRequest("page must be the next_page of the page before.", param="page")
    return float(name.removeprefix("page_"))


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, request: Request) -> Response:
    """What is known of a file."""
    return whole(_described(request, _find(request, file_id)), ())


@router.get("/v1/files/{file_id}/content")
async def download_file(file_id: str, request: Request) -> Response:
    """The bytes of a file, as they were uploaded. Ends in the middle when the file is forgotten
    meanwhile: otherwise clients that do not read could keep any number of those."""
    upload = _find(request, file_id)
    size = len(upload.file.data)
    name = urllib.parse.quote(upload.filename, safe="")
    headers = {
        # Nobody's browser shall show what others have sent.
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "Content-Length": str(size),
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-store",
    }
    return _Download(_pieces(request, file_id, size), headers=headers, media_type=_BYTES)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, request: Request) -> Response:
    """Forget a file. Requests that have found it already go on."""
    service: Service = request.app.state.service
    if not service.files.delete(request.state.tenant.id, file_id):
        raise no_file("file_id")
    return whole(DeletedFile(file_id) if is_anthropic(request.scope) else FileDeleted(file_id), ())


class _Forgotten(Exception):
    """A file is gone while it is sent."""


class _Download(StreamingResponse):
    async def stream_response(self, send: Send) -> None:
        """Leaves an answer unfinished whose file is gone; then the connection ends."""
        try:
            await super().stream_response(send)
        except _Forgotten:
            logger.info("a file was forgotten while it was sent; its connection has ended")


async def _pieces(request: Request, name: str, size: int) -> AsyncIterator[bytes]:
    """A client that does not read keeps no more than one of them. Another upload of this name has
    the same bytes."""
    for start in range(0, size, PIECE):
        yield _piece(request, name, start)


def _piece(request: Request, name: str, start: int) -> bytes:
    try:
        return _find(request, name).file.data[start : start + PIECE]
    except NotFound:
        raise _Forgotten from None


def _find(request: Request, name: str) -> Upload:
    service: Service = request.app.state.service
    upload = service.files.get(request.state.tenant.id, name)
    if upload is None:
        raise no_file("file_id")
    return upload


def _described(request: Request, upload: Upload) -> FileMetadata | FileObject:
    return _metadata(upload) if is_anthropic(request.scope) else _object(upload)


def _object(upload: Upload) -> FileObject:
    return FileObject(
        upload.id,
        len(upload.file.data),
        int(upload.created_at),
        int(upload.expires_at),
        upload.filename,
        upload.purpose,
    )


def _metadata(upload: Upload) -> FileMetadata:
    return FileMetadata(
        upload.id,
        upload.filename,
        _TYPES.get(upload.format, _BYTES),
        len(upload.file.data),
        _rfc3339(upload.created_at),
        _rfc3339(upload.expires_at),
    )


def _rfc3339(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).isoformat()
