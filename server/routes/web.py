"""The chat page: files of the package, named one by one. They hold nothing but the page itself, so
they need no key; what the page asks of the API does."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from wire.errors import NotFound

router = APIRouter()

FOLDER = Path(__file__).parents[1] / "web"
UNDER = "/web/"

_SCRIPT = "text/javascript; charset=utf-8"
_TYPES = {
    "app.js": _SCRIPT,
    "api.js": _SCRIPT,
    "boxes.js": _SCRIPT,
    "chat.js": _SCRIPT,
    "composer.js": _SCRIPT,
    "dom.js": _SCRIPT,
    "log.js": _SCRIPT,
    "markdown.js": _SCRIPT,
    "media.js": _SCRIPT,
    "store.js": _SCRIPT,
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "number.png": "image/png",
    "shapes.png": "image/png",
    "two.png": "image/png",
}
_FILES = {name: (FOLDER / name).read_bytes() for name in _TYPES}
# Their addresses change with their content, all together: a page never runs with a mixture.
VERSION = hashlib.sha256(b"".join(_FILES.values())).hexdigest()[:16]
_PAGE = (FOLDER / "index.html").read_bytes().replace(b"VERSION", VERSION.encode())

HEADERS = {
    # Nothing from elsewhere, nothing inline, and no text that becomes HTML or a script by accident.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/", include_in_schema=False)
async def chat_page(request: Request) -> Response:
    """The page, which names the current files: browsers ask each time whether it has changed."""
    return _served(request, _PAGE, "text/html; charset=utf-8", "no-cache")


@router.get("/web/{version}/{name}", include_in_schema=False)
async def chat_page_file(version: str, name: str, request: Request) -> Response:
    """One of its files. A page of another version gets it too, but must not keep it: during an
    upgrade some servers are newer than others."""
    if name not in _FILES:
        raise NotFound("The chat page has no such file.")
    kept = "public, max-age=31536000, immutable" if version == VERSION else "no-cache"
    return _served(request, _FILES[name], _TYPES[name], kept)


def _served(request: Request, content: bytes, media_type: str, cache: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "Cache-Control": cache, "ETag": tag}
    known = {each.strip() for each in request.headers.get("if-none-match", "").split(",")}
    # A proxy that compresses makes a tag weak.
    if known & {tag, f"W/{tag}", "*"}:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)
