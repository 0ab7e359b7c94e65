"""An upload taken apart as it arrives: the file of a multipart/form-data body, and its few short
fields. Everything is bounded, and nothing is ever written to a disk."""

import io
import logging
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from preprocessing.budget import Share
from server.admission import FORM_BYTES
from server.errors import UnsupportedMediaType
from server.schemas.form import clip_name
from wire.errors import BodyTooLarge, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# It warns of every form that is wrong, in words that hold a client's bytes.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

FILE = "file"
MAX_PARTS = 16
MAX_FIELD = 1024  # bytes of a value, and of a name
MAX_HEADERS = 8  # of a part, of MAX_HEADER bytes each
MAX_HEADER = 4096
MAX_BOUNDARY = 70  # RFC 2046
# Each boundary takes the parser a while, if it is none too; clients choose one that the file lacks.
MAX_BOUNDARIES = 1000
MAX_FILENAME = 255  # characters
UNNAMED = "upload"

# What could end a line, or turn around how the rest of it is read.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


async def read_upload(
    content_type: str, pieces: AsyncIterator[bytes], most: int, room: Share
) -> "UploadForm":
    """A form; its file has at most ``most`` bytes, which take their memory from ``room`` as they
    come. Raises UnsupportedMediaType, InvalidRequest, BodyTooLarge, Unavailable without room, and
    what ``pieces`` raises."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("Content-Type must be multipart/form-data.")
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise InvalidRequest(
            f"Content-Type must name the boundary of the form, of up to {MAX_BOUNDARY} bytes."
        )
    form = UploadForm(most, room)
    # The form does not know its parser: a circle would keep the file until someone looks for it.
    parser = MultipartParser(
        boundary, form.callbacks, max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER
    )
    boundaries = size = 0
    async for piece in pieces:
        size += len(piece)
        boundaries += piece.count(b"\r\n--" + boundary)
        if boundaries > MAX_BOUNDARIES:
            raise InvalidRequest("The boundary of the form stands in its file.")
        try:
            parser.write(piece)
        except FormParserError:
            raise _broken() from None
        # It takes the parser long to find that blanks are none of what could stand there.
        if size - form.size > FORM_BYTES:
            raise InvalidRequest(f"The form has more than {FORM_BYTES} bytes beside its {FILE}.")
    if not form.is_whole:
        raise _broken()
    return form


class UploadForm:
    """What a form holds, while it is read and after."""

    def __init__(self, most: int, room: Share) -> None:
        self.fields: dict[str, str] = {}
        self.filename = UNNAMED
        self.is_whole = False
        self._most = most
        self._room = room
        self._file: io.BytesIO | None = None
        self._header = self._value = b""
        self._name = ""
        self._field: bytearray | None = None  # of the part that is being read; None: it is the file
        self._parts = 0

    @property
    def file(self) -> bytes | None:
        """The bytes of the file, if there is one; without a copy, as a BytesIO lends its own
        buffer."""
        return None if self._file is None else self._file.getvalue()

    @property
    def size(self) -> int:
        """Bytes of the file, as far as it is here."""
        return 0 if self._file is None else self._file.tell()

    @property
    def callbacks(self) -> "MultipartCallbacks":
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_begin": self._begin_header,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._add,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.")
        self._name, self._field = "", bytearray()

    def _begin_header(self) -> None:
        self._header = self._value = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() != b"content-disposition":
            return
        kind, options = parse_options_header(self._value)
        if kind != b"form-data" or not options.get(b"name") or self._name:
            raise _broken()
        self._name = _text(options[b"name"], "The name of a part")
        if self._name == FILE:
            self._field = None
            self.filename = _filename(options.get(b"filename", b""))

    def _open(self) -> None:
        """The part's headers are over."""
        if not self._name:
            raise InvalidRequest(
                "Each part of the form must have a Content-Disposition and a name."
            )
        if self._name in self.fields or (self._name == FILE and self._file is not None):
            name = clip_name(self._name)
            raise InvalidRequest(f"{name} must be there once only.", param=name)
        if self._field is None:
            self._file = io.BytesIO()

    def _add(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if self._field is not None:
            if len(self._field) + size > MAX_FIELD:
                name = clip_name(self._name)
                raise InvalidRequest(
                    f"{name} must not be longer than {MAX_FIELD} bytes.", param=name
                )
            self._field += data[start:end]
        elif self._file is not None:
            if self.size + size > self._most:
                raise BodyTooLarge(
                    f"{FILE} must not be larger than {max(self._most, 0)} bytes.", param=FILE
                )
            # At once or not at all: uploads that wait for each other's room would all wait.
            if not self._room.grow(size):
                raise Unavailable(
                    "Too many files are being uploaded; try again later.", retry_after=10
                )
            self._file.write(memoryview(data)[start:end])

    def _end_part(self) -> None:
        if self._field is not None:
            self.fields[self._name] = _text(self._field, clip_name(self._name))

    def _end(self) -> None:
        self.is_whole = True


def _text(data: bytes | bytearray, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} must be UTF-8.") from None


def _filename(given: bytes) -> str:
    """Only what is behind the last slash: some clients send the whole path. It names no file of
    ours."""
    name = re.split(r"[/\\]", _text(given, "The filename"))[-1]
    if len(name) > MAX_FILENAME or _UNSAFE.search(name):
        raise InvalidRequest(
            f"{FILE}: its filename must have at most {MAX_FILENAME} characters, and no control "
            "characters.",
            param=FILE,
        )
    return name or UNNAMED


def _broken() -> InvalidRequest:
    return InvalidRequest("The body is not a whole multipart/form-data form.")
