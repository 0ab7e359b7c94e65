"""One log set-up for every process: level, time, process, request id, message; as text or as JSON,
one object a line.

The request id is a context variable, so a line logged anywhere below a request's coroutine
carries it without being handed around. User content is never logged at info.
"""

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

logger = logging.getLogger(__name__)

NOBODY = "-"
request_id: ContextVar[str] = ContextVar("request_id", default=NOBODY)
trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""In hexadecimal, where requests are traced."""


@contextlib.contextmanager
def about(identity: str) -> Iterator[None]:
    """What is logged in the block is about this request, whoever logs it."""
    token = request_id.set(identity)
    try:
        yield
    finally:
        request_id.reset(token)


LEVEL_VARIABLE = "INTERNVL_LOG_LEVEL"
FORMAT_VARIABLE = "INTERNVL_LOG_FORMAT"
NAME_VARIABLE = "INTERNVL_LOG_NAME"
"""Environment variables of the settings; a process passes them on to those it starts."""


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "request_id": request_id.get(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (trace := trace_id.get()) is not None:
            line["trace_id"] = trace
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII: what is no Unicode can be logged too


def setup(level: str, process: str, form: str = "text") -> None:
    """Send every logger of this process to standard error at ``level``, as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestId())
    text = f"%(asctime)s %(levelname)-7s {process} %(request_id)s %(name)s: %(message)s"
    handler.setFormatter(_Json(process) if form == "json" else logging.Formatter(text, "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(form == "json")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def say(text: str) -> None:
    """To the operator at the console; a line of the log where that is for machines alone."""
    if any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers):
        logger.info("%s", text.strip())
    else:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
