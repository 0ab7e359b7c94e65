"""What all clients are asked for here, and what the demo model was taught to answer."""

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import BaseModel

from tests.servers import Server, data_uri, draw, encode

MODEL = "internvl-demo"
KEY = "sk-plain"
# Of this key one request is answered at a time.
SINGLE = "sk-single"
# A small model that is held to a grammar can go on with a string for ever.
ENDS = {"repetition_penalty": 1.2}

WHAT = "What is in this picture?"
CIRCLE = "A red circle."
WHICH = "Which picture shows a blue square?"
SECOND = "Picture 2."
LAMP = "Make the light in the kitchen yellow."
TOOL = "set_light"
ABOUT = "Set the colour of a lamp"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"type": "string"}, "color": {"type": "string"}},
    "required": ["room", "color"],
    "additionalProperties": False,
}
LIGHT: dict[str, Any] = {
    "type": "function",
    "function": {"name": TOOL, "description": ABOUT, "parameters": PARAMETERS},
}
ARGUMENTS = {"room": "kitchen", "color": "yellow"}
DESCRIBE = "Describe it as JSON."
TOO_LONG = "word " * 5000


class Seen(BaseModel):
    """What a picture shows."""

    color: str
    shape: str


def png(colour: str, shape: str) -> bytes:
    return encode(draw(colour, shape))


def url(colour: str, shape: str) -> str:
    return data_uri(png(colour, shape))


def base64_of(colour: str, shape: str) -> str:
    return base64.b64encode(png(colour, shape)).decode()


def shown(colour: str, shape: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(colour, shape)}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


PICTURE = user(shown("red", "circle"), text(WHAT))
TWO = user(shown("red", "circle"), shown("blue", "square"), text(WHICH))


@contextlib.contextmanager
def occupied(server: Server) -> Iterator[None]:
    """One request of SINGLE is being answered."""
    body = {
        "prompt": "Hello",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {SINGLE}"}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60
    ) as stream:
        lines = stream.iter_lines()  # which ends the stream where nobody holds it
        assert next(lines)
        yield
