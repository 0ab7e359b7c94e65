"""The lines of a batch: requests in the form of OpenAI's batch API, and what came of each."""

import io
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MAX_LINE = 128 << 20
PREFIX = "batch_req_"
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What may be wrong with JSON; the last is of lists in lists in lists."""
_BOM = b"\xef\xbb\xbf"


class Job(msgspec.Struct):
    """A request, which is sent as it was written; ``size`` are the bytes of its line."""

    number: int
    size: int
    custom_id: str
    url: str
    body: bytes


class Misfit(msgspec.Struct):
    """A line that is none, and why."""

    number: int
    size: int
    custom_id: str | None
    reason: str


Item = Job | Misfit


class _Line(msgspec.Struct):
    custom_id: Annotated[str, Meta(min_length=1)]
    method: str
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    custom_id: Annotated[str, Meta(min_length=1)]


class _Body(msgspec.Struct):
    stream: Any = None
    background: Any = None


class Reply(msgspec.Struct):
    """What the server answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Failure(msgspec.Struct, omit_defaults=True):
    """Why there is no answer; ``line`` is that of the input, where it cannot be used."""

    code: str
    message: str
    line: int | None = None


class Outcome(msgspec.Struct):
    """A line of the output. ``custom_id`` is None where the line of the input has none of its
    own."""

    custom_id: str | None
    response: Reply | None = None
    error: Failure | None = None
    id: str = ""

    @property
    def failed(self) -> bool:
        return self.response is None or not 200 <= self.response.status_code < 300

    def encode(self) -> bytes:
        """With its end."""
        if not self.id:
            self.id = PREFIX + uuid.uuid4().hex
        fields = {"id": self.id, "custom_id": self.custom_id}
        fields |= {"response": self.response, "error": self.error}  # type: ignore[dict-item]
        return msgspec.json.encode(fields) + b"\n"

    @classmethod
    def of(cls, misfit: Misfit) -> "Outcome":
        """What is to be said of a line that is none."""
        message = f"line {misfit.number}: {misfit.reason}"
        failure = Failure("invalid_line", message, misfit.number)
        return cls(misfit.custom_id, error=failure)


def read_lines(file: BinaryIO, most: int = MAX_LINE) -> Iterator[Job | Misfit]:
    """All but the empty ones. No more of a line is kept than ``most`` bytes."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        size = len(line)
        if size > most and not line.endswith(b"\n"):
            while (rest := file.readline(io.DEFAULT_BUFFER_SIZE)) and not rest.endswith(b"\n"):
                size += len(rest)
            yield Misfit(number, size + len(rest), None, f"it has more than {most} bytes")
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if line := line.strip():
            yield _parse(number, size, line)


def _parse(number: int, size: int, line: bytes) -> Job | Misfit:
    try:
        found = msgspec.json.decode(line, type=_Line)
        body = msgspec.json.decode(found.body, type=_Body)
        line.decode()
    except UNREADABLE as error:
        return Misfit(number, size, _name(line), str(error))
    reason = ""
    if found.method != "POST":
        reason = f"the method is {found.method!r}, not 'POST'"
    elif found.url not in URLS:
        reason = f"the url is {found.url!r}, none of {', '.join(URLS)}"
    elif body.stream or body.background:
        reason = "a batch has no use for 'stream' and 'background'"
    if reason:
        return Misfit(number, size, found.custom_id, reason)
    return Job(number, size, found.custom_id, found.url, bytes(found.body))


def _name(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(line, type=_Named).custom_id
    except UNREADABLE:
        return None
