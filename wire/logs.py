"""One log set-up for every process: level, time, process, request id, message; as text or as JSON,
one object a line.

The request id is a context variable, so a line logged anywhere below a request's coroutine
carries it without being handed around. What clients send is logged at debug only: texts of
exceptions, which may quote it, are left out of the lines of the process that reads it.
"""

import contextlib
import datetime
import json
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger(__name__)

NOBODY = "-"
FRONT = "api"
"""The process that reads what clients send."""

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


class _Form(logging.Formatter):
    """What both forms have in common."""

    def __init__(self, process: str, form: str | None = None, clock: str | None = None) -> None:
        super().__init__(form, clock)
        self._process = process

    def formatException(self, ei: Any) -> str:
        """The whole of an exception, or where it came from and what kind it is."""
        if self._may_quote():
            return super().formatException(ei)
        return "\n".join(() if ei[1] is None else _kinds(ei[1], set()))

    def message(self, record: logging.LogRecord) -> str:
        """What was said; of an exception that nobody has caught asyncio says more, its text and
        what a callback was given among it."""
        said = record.getMessage()
        if record.name != "asyncio" or not record.exc_info or self._may_quote():
            return said
        return said.partition("\n")[0].partition("(")[0]

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, but for exceptions."""
        record.message = self.message(record)
        return super().formatMessage(record)

    def _may_quote(self) -> bool:
        return self._process != FRONT or logging.getLogger().isEnabledFor(logging.DEBUG)


def _kinds(error: BaseException, seen: set[int]) -> Iterator[str]:
    """As Python prints an exception and those before it, without their texts; each once, for some
    are their own reason."""
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _kinds(before, seen)
        yield "\nWhich led to:\n"
    yield "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            if id(one) not in seen:
                yield from _kinds(one, seen)


class _Json(_Form):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "request_id": request_id.get(),
            "logger": record.name,
            "message": self.message(record),
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
    handler.setFormatter(_Json(process) if form == "json" else _Form(process, text, "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda end: _uncaught(end.exc_type, end.exc_value, end.exc_traceback)
    sys.unraisablehook = lambda end: _uncaught(end.exc_type, end.exc_value, end.exc_traceback)
    for noisy in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _uncaught(kind: type[BaseException], error: BaseException | None, _: Any) -> None:
    """What Python would print as it is."""
    if issubclass(kind, KeyboardInterrupt):
        logger.info("interrupted")
    else:
        logger.critical("an exception that nobody expected", exc_info=error)


def say(text: str) -> None:
    """To the operator at the console; a line of the log where that is for machines alone."""
    if any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers):
        logger.info("%s", text.strip())
    else:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
