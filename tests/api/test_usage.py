"""What an answer says about each of its pictures, and what the metrics say about all of them."""

from collections.abc import Iterable
from typing import Any

from openai.types import CompletionUsage

from preprocessing import Spent
from tests.api.conftest import House
from tests.api.test_chat import events, picture
from tests.fake_engine import EOS, Step
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineOutput, EngineRequest

TWO: Any = [
    {
        "role": "user",
        "content": [picture("a"), {"type": "text", "text": "and"}, picture("b", "low")],
    }
]
# What tests.fake_engine makes of them: 3 tokens a tile, 250 and 500 ms.
FIRST = {
    "index": 0,
    "width": 8,
    "height": 4,
    "grid": [2, 1],
    "tiles": 2,
    "tokens": 6,
    "reduced": False,
    "fetch_ms": 250,
    "preprocess_ms": 500,
}
SECOND = FIRST | {"index": 1, "grid": [1, 1], "tiles": 1, "tokens": 3}


def script(request: EngineRequest) -> Iterable[Step]:
    """The first picture and a token of the second are cached; the second is encoded, again after
    the first token."""
    cached = request.items[1].offset + 1
    yield EngineOutput(
        request.id, encode_rendered("A"), None, None, cached, None, None, None, [0, 0.125]
    )
    yield EngineOutput(request.id, encode_rendered(" red"), None, None, cached)
    yield EngineOutput(request.id, [EOS], "stop", EOS, cached, None, None, None, [0, 0.5])


def facts(usage: CompletionUsage | None) -> Any:
    assert usage is not None
    return usage.model_dump(mode="json")["internvl"]


async def test_usage_tells_what_each_picture_took(house: House) -> None:
    house.engine.script = script
    chats = house.sdk.chat.completions
    whole = await chats.create(model="tiny", messages=TWO)
    assert facts(whole.usage) == {
        "images": [
            FIRST | {"cached_tokens": 6, "encode_ms": 0},
            SECOND | {"cached_tokens": 1, "encode_ms": 625},
        ],
        "videos": [],
    }
    stream = await chats.create(
        model="tiny", messages=TWO, stream=True, stream_options={"include_usage": True}
    )
    last = [chunk async for chunk in stream][-1]
    assert facts(last.usage) == facts(whole.usage)
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.model_dump()["image_tokens"] == 9


async def test_what_several_choices_took_is_added_up(house: House) -> None:
    house.engine.script = script
    answer = await house.ask(messages=TWO, n=3)
    images = answer.json()["usage"]["internvl"]["images"]
    assert [image["encode_ms"] for image in images] == [0, 3 * 625]
    assert [image["cached_tokens"] for image in images] == [6, 1]


async def test_an_answer_ended_by_a_stop_string_has_its_usage(house: House) -> None:
    house.engine.script = script
    answer = await house.ask(messages=TWO, stop=["red"])
    assert house.engine.aborted
    images = answer.json()["usage"]["internvl"]["images"]
    assert [image["encode_ms"] for image in images] == [0, 125]


async def test_an_answer_without_pictures_says_nothing_of_them(house: House) -> None:
    assert "internvl" not in (await house.ask()).json()["usage"]
    stream = await house.ask(stream=True, stream_options={"include_usage": True})
    assert "internvl" not in events(stream.text)[-1]["usage"]


async def test_metrics_tell_what_pictures_took(house: House) -> None:
    house.engine.script = script
    await house.ask(messages=TWO)
    house.media.spent = Spent(0.002)  # its tiles are in the cache
    await house.ask(messages=TWO)
    await house.ask()
    page = (await house.http.get("/metrics")).text
    for line in (
        "media_fetch_seconds_count 4.0",
        "media_fetch_seconds_sum 0.504",
        "media_queue_seconds_count 2.0",
        "media_queue_seconds_sum 0.25",
        "media_decode_seconds_count 2.0",
        "media_decode_seconds_sum 0.5",
        "media_tile_seconds_count 2.0",
        "media_tile_seconds_sum 0.25",
        "media_encode_seconds_count 2.0",
        "media_encode_seconds_sum 1.25",
        "request_tiles_count 2.0",
        "request_tiles_sum 6.0",
        "request_visual_tokens_count 2.0",
    ):
        assert f"internvl_{line}\n" in page, line


async def test_metrics_count_refused_pictures_and_what_became_of_decode_workers(
    house: House,
) -> None:
    bad = [{"role": "user", "content": [picture("bad")]}]
    assert (await house.ask(messages=bad)).status_code == 400
    previewed = await house.http.post("/v1/internvl/preview", json={"messages": bad})
    assert previewed.status_code == 400
    house.media.stats.kills["timeout"] = 2
    house.media.stats.replaced = 5
    page = (await house.http.get("/metrics")).text
    assert 'internvl_media_rejected_total{reason="invalid_media"} 2.0' in page
    assert 'internvl_sandbox_kills_total{reason="timeout"} 2.0' in page
    assert 'internvl_sandbox_kills_total{reason="seccomp"} 0.0' in page
    assert "internvl_decode_workers_replaced_total 5.0" in page
