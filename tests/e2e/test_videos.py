"""The demo model sees films: encoded here, sent as a client sends them, on a real server."""

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests import clips
from tests.servers import Server, data_uri, draw, encode

H264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast"]
CODECS = {
    "film.mp4": H264,
    "film.mov": H264,
    "film.mkv": H264,
    "film.webm": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"],
    "film.avi": ["-c:v", "mjpeg", "-q:v", "2"],
    "film.gif": [],
}
STEPS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
COUNT = 24


def moving(way: str) -> list[Image.Image]:
    """A blue square that moves over a white ground."""
    thing = draw("blue", "square", (56, 56))
    frames = []
    for at in range(COUNT):
        frame = Image.new("RGB", (112, 112), "white")
        done = at / (COUNT - 1)
        x, y = (28 + round(28 * step * (2 * done - 1)) for step in STEPS[way])
        frame.paste(thing, (x, y))
        frames.append(frame)
    return frames


def ask(server: Server, film: dict[str, Any], question: str, **body: Any) -> Any:
    content = [{"type": "video_url", "video_url": film}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0} | body
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()


def url(encoded: bytes, name: str) -> str:
    kind = "image/gif" if name.endswith("gif") else "video/" + name.rsplit(".", 1)[1]
    return data_uri(encoded, kind)


QUESTION = "Which way does the square move?"


@pytest.mark.parametrize("way", STEPS)
def test_it_sees_which_way_a_thing_moves(demo_server: Server, tmp_path: Path, way: str) -> None:
    film = clips.encode(tmp_path / "film.mp4", H264, pictures=moving(way))
    asked = {"url": url(film, "film.mp4"), "num_frames": 4}
    answer = ask(demo_server, asked, QUESTION)
    assert way in answer["choices"][0]["message"]["content"]
    (shown,) = answer["usage"]["internvl"]["videos"]
    # The reference's formula: the middles of four equal segments of the 24 frames.
    segment = (COUNT - 1) / 4
    assert shown["frames"] == [int(segment / 2 + round(segment * k)) for k in range(4)]
    assert shown["seconds"] == pytest.approx([at / 25 for at in shown["frames"]], abs=1e-3)
    assert (shown["source_frames"], shown["fps"]) == (COUNT, 25.0)
    assert shown["tokens"] == shown["tiles"] * 16 == 64


@pytest.mark.parametrize("name", CODECS)
def test_every_usual_container_is_seen_alike(
    demo_server: Server, tmp_path: Path, name: str
) -> None:
    film = clips.encode(tmp_path / name, CODECS[name], pictures=moving("left"))
    answer = ask(demo_server, {"url": url(film, name), "num_frames": 4}, QUESTION)
    assert "left" in answer["choices"][0]["message"]["content"]


def test_a_film_that_is_shown_again_is_not_computed_again(
    demo_server: Server, tmp_path: Path
) -> None:
    film = clips.encode(tmp_path / "film.mp4", H264, pictures=moving("up"))
    asked = {"url": url(film, "film.mp4"), "num_frames": 6}
    first, again = (ask(demo_server, asked, QUESTION, max_tokens=4) for _ in range(2))
    assert first["choices"][0]["message"] == again["choices"][0]["message"]
    (shown,) = again["usage"]["internvl"]["videos"]
    assert shown["preprocess_ms"] == shown["encode_ms"] == 0
    assert shown["cached_tokens"] == shown["tokens"]


def test_part_of_a_film_is_shown(demo_server: Server, tmp_path: Path) -> None:
    film = clips.encode(tmp_path / "film.mp4", H264, count=50)
    asked = {"url": url(film, "film.mp4"), "start": 0.4, "end": 1.2, "fps": 5}
    answer = ask(demo_server, asked, "What do you see?", max_tokens=1)
    (shown,) = answer["usage"]["internvl"]["videos"]
    assert len(shown["frames"]) == 4
    assert all(10 <= at <= 30 for at in shown["frames"])


def test_a_film_gives_up_frames_where_the_prompt_would_not_fit(
    demo_server: Server, tmp_path: Path
) -> None:
    film = clips.encode(tmp_path / "film.mp4", H264, count=200, size=(336, 224))
    asked = {"url": url(film, "film.mp4"), "num_frames": 100, "max_tiles": 6}
    answer = ask(demo_server, asked, "What do you see?", max_tokens=8)
    (shown,) = answer["usage"]["internvl"]["videos"]
    assert shown["reduced"]
    assert 10 < len(shown["frames"]) < 100
    assert answer["usage"]["prompt_tokens"] <= 4096 - 8
    refused = ask(demo_server, asked | {"fit": False}, "What do you see?")
    assert refused["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("film", "code"),
    [
        ({"url": data_uri(b"no film", "video/mp4")}, "unsupported_media"),
        ({"url": data_uri(b"\0\0\0\x18ftypmp42" + bytes(40), "video/mp4")}, None),
        ({"url": "data:video/mp4;base64,!"}, "invalid_media"),
        ({"frames": [data_uri(b"no picture")]}, "unsupported_media"),
    ],
)
def test_what_is_no_film_is_refused_by_the_name_of_its_field(
    demo_server: Server, film: dict[str, Any], code: str | None
) -> None:
    error = ask(demo_server, film, "What do you see?")["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("messages[0].content[0].video_url.")
    if code:
        assert error["code"] == code
    assert demo_server.ask("Hello!")


def test_a_range_that_the_film_does_not_have_is_refused(
    demo_server: Server, tmp_path: Path
) -> None:
    film = clips.encode(tmp_path / "film.mp4", H264)
    error = ask(demo_server, {"url": url(film, "film.mp4"), "start": 9.0}, "What?")["error"]
    assert error["code"] == "invalid_value"
    assert "'start'" in error["message"]


def test_frames_as_one_url_are_those_frames(demo_server: Server) -> None:
    frames = [base64.b64encode(encode(frame, "jpeg")).decode() for frame in moving("right")[::6]]
    joined = "data:video/jpeg;base64," + ",".join(frames)
    listed = [f"data:image/jpeg;base64,{frame}" for frame in frames]
    answers = [
        ask(demo_server, film, QUESTION)["choices"][0]["message"]["content"]
        for film in ({"url": joined}, {"frames": listed})
    ]
    assert answers[0] == answers[1]
    assert "right" in answers[0]


def test_base64_of_frames_is_strict(demo_server: Server) -> None:
    good = base64.b64encode(b"x").decode()
    error = ask(demo_server, {"url": f"data:video/jpeg;base64,{good},"}, "What?")["error"]
    assert error["param"].startswith("messages[0].content[0].video_url.url")
