"""What the model sees of a picture does not depend on its file: over HTTP, on the demo model."""

from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from tests.pictures import encode, lossless, stored, turned
from tests.servers import COLOURS, Server, data_uri, part

# A red circle and a blue square, so that no turn of the picture equals another.
SHOWN = Image.new("RGB", (240, 160), "white")
ImageDraw.Draw(SHOWN).ellipse((10, 10, 90, 90), fill=COLOURS["red"])
ImageDraw.Draw(SHOWN).rectangle((150, 100, 200, 150), fill=COLOURS["blue"])
ENCODINGS = lossless(SHOWN)


def first_token(server: Server, picture: bytes) -> dict[str, float]:
    """The likeliest first tokens of an answer, and how likely they are."""
    content = [part(data_uri(picture)), part("What is in this picture?")]
    body: dict[str, Any] = {"max_tokens": 1, "logprobs": True, "top_logprobs": 10, "temperature": 0}
    body["messages"] = [{"role": "user", "content": content}]
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (entry,) = answer.json()["choices"][0]["logprobs"]["content"]
    return {likely["token"]: likely["logprob"] for likely in entry["top_logprobs"]}


def like(expected: dict[str, float]) -> Any:
    """Equal but for float32's last digits: a prompt found in the cache is summed up otherwise."""
    return pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def expected(demo_server: Server) -> dict[str, float]:
    return first_token(demo_server, ENCODINGS["PNG"])


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_lossless_encoding_is_the_same_picture(
    demo_server: Server, expected: dict[str, float], name: str
) -> None:
    assert first_token(demo_server, ENCODINGS[name]) == like(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_orientation_is_the_same_picture(
    demo_server: Server, expected: dict[str, float], orientation: int, kind: str
) -> None:
    encoded = encode(stored(SHOWN, orientation), kind, exif=turned(orientation))
    assert first_token(demo_server, encoded) == like(expected)


def test_another_picture_is_another_one(demo_server: Server, expected: dict[str, float]) -> None:
    """What is compared here can differ: the same pixels, upside down."""
    assert first_token(demo_server, encode(stored(SHOWN, 3))) != like(expected)
