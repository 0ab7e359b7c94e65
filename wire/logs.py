"""One log set-up for every process: level, time, process, request id, message.

The request id is a context variable, so a line logged anywhere below a request's coroutine
carries it without being handed around. User content is never logged at info.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")


@contextlib.contextmanager
def about(identity: str) -> Iterator[None]:
    """What is logged in the block is about this request, whoever logs it."""
    token = request_id.set(identity)
    try:
        yield
    finally:
        request_id.reset(token)


LEVEL_VARIABLE = "INTERNVL_LOG_LEVEL"
"""Environment variable of the setting; a process passes it on to those it starts."""


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


def setup(level: str, process: str) -> None:
    """Send every logger of this process to standard error at ``level``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RequestId())
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s %(levelname)-7s {process} %(request_id)s %(name)s: %(message)s",
            "%H:%M:%S",
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
