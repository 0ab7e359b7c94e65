"""instructor: pydantic models out of pictures and of questions, in each of its modes for OpenAI's
and Anthropic's APIs."""

from typing import Any

import instructor
import pytest
from anthropic import Anthropic
from instructor import Mode
from instructor.processing.multimodal import Image
from openai import OpenAI
from pydantic import create_model

from tests.clients.asking import ABOUT, ARGUMENTS, DESCRIBE, ENDS, KEY, LAMP, MODEL, TOOL, Seen, url
from tests.servers import Server

CALLED: Any = [{"role": "user", "content": LAMP}]
SHOWN: Any = {"role": "user", "content": [DESCRIBE, Image.from_base64(url("red", "circle"))]}
# The model's name is the tool's.
SetLight = create_model(TOOL, __doc__=ABOUT, room=(str, ...), color=(str, ...))


def client(server: Server, mode: Mode) -> instructor.Instructor:
    if mode is Mode.ANTHROPIC_TOOLS:
        sdk: Any = Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
        return instructor.from_anthropic(sdk, mode=mode)
    sdk = OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
    return instructor.from_openai(sdk, mode=mode)


def asking(mode: Mode) -> Any:
    greedy = ENDS | {"temperature": 0}
    if mode is Mode.ANTHROPIC_TOOLS:
        return {"model": MODEL, "max_tokens": 100, "extra_body": greedy, "max_retries": 0}
    return {"model": MODEL, "extra_body": greedy, "max_retries": 0}


MODES = [
    Mode.TOOLS,
    Mode.TOOLS_STRICT,
    Mode.JSON_SCHEMA,
    Mode.RESPONSES_TOOLS,
    Mode.ANTHROPIC_TOOLS,
]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_picture_shows_is_a_model(server: Server, mode: Mode) -> None:
    seen = client(server, mode).create(messages=[SHOWN], response_model=Seen, **asking(mode))
    assert isinstance(seen, Seen)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.RESPONSES_TOOLS, Mode.ANTHROPIC_TOOLS])
def test_a_question_is_a_model(server: Server, mode: Mode) -> None:
    made, raw = client(server, mode).create_with_completion(
        messages=CALLED, response_model=SetLight, **asking(mode)
    )
    assert made.model_dump() == ARGUMENTS
    assert raw.usage


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_a_model_is_filled_while_it_is_written(server: Server, mode: Mode) -> None:
    parts = list(
        client(server, mode).create_partial(messages=[SHOWN], response_model=Seen, **asking(mode))
    )
    assert len(parts) > 2
    assert parts[0].shape is None
    assert parts[-1].shape
