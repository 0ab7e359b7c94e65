"""What the log of the API process says of requests, and what it never says."""

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import House
from tests.fake_engine import Step
from wire.errors import EngineFailed
from wire.logs import FRONT, setup
from wire.messages import EngineOutput, EngineRequest

SECRET = "Kleopatra"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What stands on the console of a server at "info"."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for hook in ("sys.excepthook", "threading.excepthook", "sys.unraisablehook"):
        monkeypatch.setattr(hook, None)  # put back afterwards
    sink = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", sink)
        setup("info", FRONT, "json")
    yield sink
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def fails_unexpectedly(request: EngineRequest) -> Iterator[Step]:
    yield EngineOutput(request.id, [5])
    raise ValueError(f"nobody knows {SECRET}")


def refuses(request: EngineRequest) -> Iterator[Step]:
    raise EngineFailed(f"not with {SECRET}")


async def test_nothing_that_clients_send_is_logged_at_info_whatever_goes_wrong(
    house: House, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://example.org/{SECRET}?key={SECRET}"
    asked: list[dict[str, Any]] = [
        {"user": SECRET, SECRET: SECRET, "stop": [SECRET], "metadata": {SECRET: SECRET}},
        {"temperature": SECRET},
        {"model": SECRET},
        {"response_format": {"type": "json_schema", "json_schema": {"name": SECRET}}},
        {"regex": f"({SECRET}"},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "bad"}]}]},
    ]
    for body in asked:
        answer = await house.ask(**{"messages": [{"role": "user", "content": SECRET}]} | body)
        assert answer.status_code < 500, answer.text
    house.engine.script = fails_unexpectedly
    for stream in (False, True):
        await house.ask(stream=stream)
    house.engine.script = refuses
    assert (await house.ask()).status_code == 500

    async def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(house.media, "open", lost)
    picture = {"type": "image_url", "image_url": {"url": url}}
    answer = await house.ask(messages=[{"role": "user", "content": [picture]}])
    assert answer.status_code == 500
    told = log.getvalue()
    assert SECRET not in told
    assert told.count('ValueError"') == 2
    assert told.count('RuntimeError"') == 1
    assert told.count("status=") == len(asked) + 4
