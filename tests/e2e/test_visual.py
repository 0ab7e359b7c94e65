"""Budgets, previews and frames on a real server, with real files and headers."""

import random
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.servers import Server, data_uri, draw, encode

QUESTION = {"type": "text", "text": "What is in this picture?"}


def picture(size: tuple[int, int], orientation: int = 1, **fields: Any) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(draw("red", "circle", size), "jpeg", exif=exif)
    return {"type": "image_url", "image_url": {"url": data_uri(encoded, "image/jpeg")} | fields}


def film(count: int, **fields: Any) -> dict[str, Any]:
    """A blue square that moves to the right, as pictures."""
    frames = []
    for step in range(count):
        frame = Image.new("RGB", (112, 112), "white")
        frame.paste(draw("blue", "square", (56, 56)), (round(56 * step / max(count - 1, 1)), 28))
        frames.append(data_uri(encode(frame)))
    return {"type": "video_url", "video_url": {"frames": frames} | fields}


def post(server: Server, path: str, *parts: dict[str, Any], **body: Any) -> Any:
    body = {"messages": [{"role": "user", "content": [*parts, QUESTION]}], "temperature": 0} | body
    answer = httpx.post(server.url + path, json=body, timeout=60)
    return answer.json()


def chat(server: Server, *parts: dict[str, Any], **body: Any) -> Any:
    return post(server, "/v1/chat/completions", *parts, **({"max_tokens": 1} | body))


def preview(server: Server, *parts: dict[str, Any], **body: Any) -> Any:
    return post(server, "/v1/internvl/preview", *parts, **({"max_tokens": 1} | body))


def test_a_preview_counts_what_the_request_then_takes(demo_server: Server) -> None:
    draw = random.Random(5)
    for _ in range(40):
        parts = []
        for _ in range(draw.randint(1, 4)):
            size = draw.randint(1, 500), draw.randint(1, 500)
            most = draw.choice([None, 1, 5, 12])
            kind = draw.random()
            if kind < 0.75:
                fields = {"max_tiles": most, "fit": draw.choice([True, False, None])}
                parts.append(picture(size, draw.randint(1, 8), **fields))
            else:
                parts.append(film(draw.randint(1, 6), max_tiles=most))
        body: dict[str, Any] = {}
        if draw.random() < 0.5:
            body["visual_budget"] = {"max_tiles": draw.randint(len(parts), 40)}
        told, used = preview(demo_server, *parts, **body), chat(demo_server, *parts, **body)
        assert told["fits"] is True
        usage = used["usage"]
        assert told["prompt_tokens"] == usage["prompt_tokens"]
        assert told["visual_tokens"] == usage["prompt_tokens_details"]["image_tokens"]
        for kind, name in (("image", "images"), ("video", "videos")):
            expected = [part for part in told["parts"] if part["type"] == kind]
            shown = usage["internvl"][name]
            for field in ("width", "height", "tiles", "tokens"):
                assert [one[field] for one in expected] == [one[field] for one in shown]
            for one, seen in zip(expected, shown, strict=True):
                assert one.get("reduced", False) == seen["reduced"]
                assert one.get("grid") == seen.get("grid")


def test_a_preview_needs_no_pixels(demo_server: Server) -> None:
    whole = encode(Image.effect_noise((400, 300), 90).convert("RGB"), "png")
    head = {"type": "image_url", "image_url": {"url": data_uri(whole[:2000])}}
    (part,) = preview(demo_server, head)["parts"]
    assert (part["width"], part["height"], part["grid"]) == (400, 300, [4, 3])
    assert chat(demo_server, head)["error"]["code"] == "invalid_media"


def test_what_does_not_fit_does_with_the_budget_that_the_preview_names(
    demo_server: Server,
) -> None:
    parts = [picture((448, 336))] * 21
    assert chat(demo_server, *parts)["error"]["code"] == "context_length_exceeded"
    told = preview(demo_server, *parts)
    assert told["fits"] is False
    used = chat(demo_server, *parts, visual_budget=told["largest"]["visual_budget"])
    assert used["usage"]["prompt_tokens"] == told["largest"]["prompt_tokens"]
    assert any(one["reduced"] for one in used["usage"]["internvl"]["images"])
    more = {"max_tiles": told["largest"]["visual_budget"]["max_tiles"] + 21 * 2}
    assert preview(demo_server, *parts, visual_budget=more)["fits"] is False


@pytest.mark.parametrize("count", [4, 6])
def test_the_demo_model_sees_motion_over_frames(demo_server: Server, count: int) -> None:
    question = {"type": "text", "text": "Which way does the square move?"}
    body = {"messages": [{"role": "user", "content": [film(count), question]}], "temperature": 0}
    answer = httpx.post(demo_server.url + "/v1/chat/completions", json=body, timeout=60).json()
    assert "right" in answer["choices"][0]["message"]["content"]


def test_long_films_give_up_frames_until_they_fit(demo_server: Server) -> None:
    # 128 frames of up to 13 tiles are more than the context holds.
    long = film(128, max_tiles=12, min_tiles=12)
    (shown,) = chat(demo_server, long)["usage"]["internvl"]["videos"]
    assert shown["reduced"]
    assert 1 < len(shown["frames"]) < 128
    assert shown["frames"] == sorted(set(shown["frames"]))
