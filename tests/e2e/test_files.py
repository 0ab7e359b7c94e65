"""Files against the demo model through a real socket, with the official clients."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from PIL import Image

from tests.clips import ffmpeg
from tests.servers import Server, data_uri, draw, encode

DEMO = "internvl-demo"
WHAT = "What is in this picture?"
FORMS = ("completions", "parts", "responses", "input_file", "messages", "streamed")


@pytest.fixture
def sdk(demo_server: Server) -> Iterator[OpenAI]:
    with demo_server.client() as client:
        yield client


@pytest.fixture
def claude(demo_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo_server.url, api_key="test", max_retries=0) as client:
        yield client


def picture(colour: str, shape: str, seed: int) -> bytes:
    """One that no other test sends: its corner has a colour of its own."""
    drawn = draw(colour, shape)
    drawn.putpixel((0, 0), tuple(random.Random(seed).choices(range(200, 256), k=3)))
    return encode(drawn)


def ask(form: str, name: str, sdk: OpenAI, claude: Anthropic) -> str | None:
    """The answer of the demo model about a file."""
    parts: dict[str, Any] = {
        "completions": {"type": "image_url", "image_url": {"url": name}},
        "streamed": {"type": "image_url", "image_url": name},
        "parts": {"type": "file", "file": {"file_id": name}},
        "responses": {"type": "input_image", "file_id": name, "detail": "auto"},
        "input_file": {"type": "input_file", "file_id": name},
        "messages": {"type": "image", "source": {"type": "file", "file_id": name}},
    }
    part, text = parts[form], {"type": "text", "text": WHAT}
    turn: Any = {"role": "user", "content": [part, text]}
    if form in ("responses", "input_file"):
        turn["content"][1] = {"type": "input_text", "text": WHAT}
        return sdk.responses.create(model=DEMO, input=[turn], temperature=0).output_text
    if form == "messages":
        message = claude.messages.create(
            model=DEMO, max_tokens=64, messages=[turn], extra_body={"temperature": 0}
        )
        return message.content[0].text
    if form == "streamed":
        chunks = sdk.chat.completions.create(
            model=DEMO, messages=[turn], temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    answer = sdk.chat.completions.create(model=DEMO, messages=[turn], temperature=0)
    return answer.choices[0].message.content


def test_openais_client_uploads_asks_in_every_way_and_deletes(
    demo_server: Server, sdk: OpenAI, claude: Anthropic
) -> None:
    data = picture("green", "triangle", 1)
    before = demo_server.metric("internvl_decode_jobs_total") or 0
    made = sdk.files.create(
        file=("green triangle.png", data),
        purpose="vision",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.filename, made.bytes, made.status) == (
        "green triangle.png",
        len(data),
        "processed",
    )
    assert made.expires_at == made.created_at + 3600
    assert sdk.files.retrieve(made.id) == made
    assert made in list(sdk.files.list(purpose="vision", limit=1))  # page by page
    assert sdk.files.content(made.id).content == data
    assert sdk.files.create(file=io.BytesIO(data), purpose="vision").id == made.id
    for form in FORMS:
        assert ask(form, made.id, sdk, claude) == "A green triangle.", form
    assert demo_server.metric("internvl_decode_jobs_total") == before + 1
    # The picture itself, sent otherwise, has the same tiles too.
    assert demo_server.ask(data_uri(data), WHAT) == "A green triangle."
    assert demo_server.metric("internvl_decode_jobs_total") == before + 1
    assert sdk.files.delete(made.id).deleted
    for form in FORMS:
        with pytest.raises((openai.NotFoundError, anthropic.NotFoundError)) as caught:
            ask(form, made.id, sdk, claude)
        assert "no such file" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(made.id)


def test_anthropics_client_uploads_asks_and_deletes(claude: Anthropic, sdk: OpenAI) -> None:
    data = picture("red", "square", 2)
    for files in (claude.files, claude.beta.files):
        made = files.upload(file=("red square.png", data, "image/png"))
        assert (made.type, made.mime_type, made.size_bytes) == ("file", "image/png", len(data))
        assert made.created_at.tzinfo is not None
        assert made == files.retrieve_metadata(made.id)
        other = files.upload(file=("blue.png", picture("blue", "circle", 3), "image/png"))
        assert {one.id for one in files.list(limit=1)} >= {made.id, other.id}
        assert [one.id for one in files.list(ids=[made.id, "file-x"])] == [made.id]
        assert files.download(made.id).read() == data
        assert ask("messages", made.id, sdk, claude) == "A red square."
        assert ask("completions", made.id, sdk, claude) == "A red square."
        assert files.delete(made.id).type == "file_deleted"
        with pytest.raises(anthropic.NotFoundError):
            files.retrieve_metadata(made.id)
        for one in files.list(limit=1):  # page by page, each gone before the next is asked for
            files.delete(one.id)
        assert list(files.list()) == []


def test_a_video_is_shown_as_frames_and_an_animation_as_either(
    sdk: OpenAI, demo_server: Server, tmp_path: Path
) -> None:
    for number in range(4):
        draw("blue", "circle").save(tmp_path / f"{number}.png")
    frames = ("-framerate", "4", "-i", tmp_path / "%d.png")
    ffmpeg(*frames, "-c:v", "libx264", "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    ffmpeg(*frames, tmp_path / "a.gif")

    def usage(part: dict[str, Any]) -> Any:
        body = {
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": WHAT}]}],
            "max_tokens": 1,
        }
        answer = httpx.post(demo_server.url + "/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found = answer.json()["usage"]["internvl"]
        return len(found["images"]), [len(video["frames"]) for video in found["videos"]]

    film = sdk.files.create(file=tmp_path / "a.mp4", purpose="user_data").id
    assert usage({"type": "file", "file": {"file_id": film}}) == (0, [4])
    asked = {"url": film, "num_frames": 2}
    assert usage({"type": "video_url", "video_url": asked}) == (0, [2])
    animation = sdk.files.create(file=tmp_path / "a.gif", purpose="user_data").id
    assert usage({"type": "file", "file": {"file_id": animation}}) == (1, [])
    assert usage({"type": "video_url", "video_url": animation}) == (0, [4])
    turn: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": film}}]}
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=DEMO, messages=[turn])
    assert caught.value.code == "unsupported_media"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"x", "unsupported_media"),
        (b"%PDF-1.7\n" + bytes(3000), "unsupported_media"),
        (b"<html><body>" * 99, "unsupported_media"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported_media"),
        (encode(Image.new("RGB", (9, 9)))[:20], "invalid_media"),
        (b"ID3" + bytes(3000), "unsupported_media"),
        (b"\0\0\0\x18ftypmp42" + bytes(3000), "invalid_media"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "unsupported_media"),
        (bytes(100_000), "unsupported_media"),
    ],
)
def test_what_cannot_be_shown_is_refused_when_it_is_uploaded(
    sdk: OpenAI, data: bytes, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.files.create(file=("a.png", data), purpose="vision")
    assert (caught.value.code, caught.value.param) == (code, "file")
    assert all(file.bytes != len(data) for file in sdk.files.list())


def test_a_picture_that_no_server_decodes_is_refused_by_its_header(sdk: OpenAI) -> None:
    bomb = encode(Image.new("1", (1, 1)))
    huge = bomb[:16] + (60_000).to_bytes(4, "big") * 2 + bomb[24:]
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.files.create(file=("a.png", huge), purpose="vision")
    assert caught.value.code in ("media_too_large", "invalid_media")  # its checksum is wrong too
