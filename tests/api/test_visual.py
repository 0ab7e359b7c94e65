"""Pictures and videos of a request over HTTP: what parts may ask, what they get, what it costs."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from tests.api.conftest import House, Houses
from tests.fake_engine import CHAT, EOS, FakeEngine, Step, make_ready
from tests.small_tokenizer import encode_rendered
from wire.messages import EngineOutput, EngineRequest

PICTURE = {"type": "image_url", "image_url": {"url": "data:picture"}}
# 8 pixels by 4 in tiles of 4: two tiles and a thumbnail, of 3 tokens each.
TILES, PER_TILE = 3, 3


def image(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:picture"} | fields}


def video(**fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": "data:video"} | fields}


def user(*parts: Any) -> list[dict[str, Any]]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": texts}]


async def usage(house: House, *parts: Any, **body: Any) -> Any:
    answer = await house.ask(messages=user(*parts), **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


async def refused(house: House, *parts: Any, **body: Any) -> Any:
    answer = await house.ask(messages=user(*parts), **body)
    assert answer.status_code == 400
    return answer.json()["error"]


async def previewed(house: House, *parts: Any, **body: Any) -> Any:
    answer = await house.http.post("/v1/internvl/preview", json={"messages": user(*parts)} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_frames_stand_in_the_prompt_as_in_the_reference(house: House) -> None:
    await house.ask(messages=user("Look: ", video(num_frames=2), "What moves?"))
    (request,) = house.engine.requests
    shown = "<img>" + "<IMG_CONTEXT>" * PER_TILE + "</img>"
    assert request.prompt == encode_rendered(
        f"<|im_start|>user\nLook: Frame1: {shown}\nFrame2: {shown}\nWhat moves?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [item.tiles for item in request.items] == [1, 1]


async def test_a_video_is_not_counted_when_pictures_are_numbered(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(CHAT)))
    await house.ask(messages=user(PICTURE, video(num_frames=1), "x"))
    await house.ask(messages=user(PICTURE, video(num_frames=1), PICTURE, "x"))
    one, two = (house.engine.requests[index].prompt for index in (0, 1))
    label = encode_rendered("Image-1: ")[:3]
    assert not any(one[at : at + 3] == label for at in range(len(one)))
    assert any(two[at : at + 3] == label for at in range(len(two)))


async def test_usage_tells_of_pictures_and_videos_apart(house: House) -> None:
    found = (await usage(house, video(num_frames=3), image(detail="low"), image()))["internvl"]
    assert [one["index"] for one in found["images"]] == [0, 1]
    assert [one["tiles"] for one in found["images"]] == [1, 2]
    (film,) = found["videos"]
    assert film["frames"] == [0, 1, 2]
    assert film["seconds"] == [0.0, 1.0, 2.0]
    assert (film["tiles"], film["tokens"]) == (3, 3 * PER_TILE)
    assert (film["source_frames"], film["duration"], film["fps"]) == (10, 10.0, 1.0)
    assert film["reduced"] is False


async def test_a_video_may_be_given_as_pictures_in_two_ways(house: House) -> None:
    listed = {"type": "video_url", "video_url": {"frames": ["data:a", "data:b", "data:c"]}}
    joined = video(url="data:video/jpeg;base64,QQ==,QUI=,QUJD")
    for part in (listed, joined):
        (film,) = (await usage(house, part))["internvl"]["videos"]
        assert film["frames"] == [0, 1, 2]
        assert "duration" in film
        assert film["duration"] is None
    assert house.media.parts[-1].url == tuple(
        f"data:image/jpeg;base64,{data}" for data in ("QQ==", "QUI=", "QUJD")
    )


async def test_parts_say_how_they_are_shown_and_the_request_for_those_that_do_not(
    house: House,
) -> None:
    own = image(preprocess="normalized", max_tiles=4, min_tiles=2)
    await house.ask(messages=user(own, image()), preprocess="reference")
    first, second = house.media.parts
    assert (first.treatment, first.max_tiles, first.min_tiles) == ("normalized", 4, 2)
    assert (second.treatment, second.max_tiles, second.min_tiles) == ("reference", None, None)


async def test_what_a_part_leaves_open_is_settled(house: House) -> None:
    await house.ask(messages=user(image(detail="low", max_tiles=4), image(detail="low")))
    assert [part.max_tiles for part in house.media.parts] == [4, 1]
    await house.ask(messages=user(video(), video(fps=2.0), video(fps=2.0, num_frames=5)))
    assert [part.choice and part.choice.most for part in house.media.parts[2:]] == [32, 128, 5]


async def test_times_and_cached_tokens_are_those_of_each_part(houses: Houses) -> None:
    def script(request: EngineRequest) -> Iterable[Step]:
        seconds = [float(at) for at, _ in enumerate(request.items, 1)]
        cached = request.items[2].offset + 1
        yield EngineOutput(request.id, [5], cached_tokens=cached, encode_seconds=seconds)
        yield EngineOutput(request.id, [EOS], finish_reason="stop", stop_token=EOS)

    house = await houses.open(FakeEngine(script=script))
    found = (await usage(house, video(num_frames=2), image(detail="low"), image()))["internvl"]
    (film,), (first, second) = found["videos"], found["images"]
    assert (film["encode_ms"], first["encode_ms"], second["encode_ms"]) == (3000, 3000, 4000)
    assert (film["cached_tokens"], first["cached_tokens"], second["cached_tokens"]) == (6, 1, 0)


async def test_other_servers_names_of_the_same_are_understood(house: House) -> None:
    await house.ask(
        messages=user(image(max_dynamic_patch=6, min_dynamic_patch=2), video(max_frames=3))
    )
    picture, film = house.media.parts
    assert (picture.max_tiles, picture.min_tiles) == (6, 2)
    assert film.choice is not None
    assert film.choice.most == 3


PART = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (image(max_tiles=13), f"{PART}.image_url.max_tiles", "at most 12"),
        (image(max_tiles=0), f"{PART}.image_url.max_tiles", "at least 1"),
        (image(min_tiles=13), f"{PART}.image_url.min_tiles", "at most 12"),
        (image(min_tiles=3, max_tiles=2), f"{PART}.image_url.min_tiles", "at most 2"),
        (image(min_tiles=2, detail="low"), f"{PART}.image_url.min_tiles", "at most 1"),
        (image(preprocess="nice"), f"{PART}.image_url.preprocess", "normalized"),
        (video(min_tiles=2), f"{PART}.video_url.min_tiles", "at most 1"),
        (video(num_frames=129), f"{PART}.video_url.num_frames", "at most 128"),
        (video(num_frames=0), f"{PART}.video_url.num_frames", "at least 1"),
        (video(fps=0), f"{PART}.video_url.fps", "greater than 0"),
        (video(start=-1), f"{PART}.video_url.start", "at least 0"),
        (video(start=3, end=3), f"{PART}.video_url.start", "less than 'end'"),
        (video(frames=["data:a"]), f"{PART}.video_url", "either 'url' or 'frames'"),
        (video(url=None), f"{PART}.video_url", "either 'url' or 'frames'"),
        (video(url=None, frames=[]), f"{PART}.video_url.frames", "empty"),
        (video(url=None, frames=["data:a"], fps=1.0), f"{PART}.video_url", "leave out"),
        (video(url=None, frames=["data:a"] * 129), f"{PART}.video_url.frames", "at most 128"),
        (video(url="data:video/jpeg;base64," + "," * 128), f"{PART}.video_url.url", "at most 128"),
        (video(url="data:bad"), f"{PART}.video_url.url", "damaged"),
        ({"type": "video_url"}, f"{PART}.video_url", "missing"),
    ],
)
async def test_what_a_part_cannot_ask_is_named(
    house: House, part: Any, param: str, words: str
) -> None:
    error = await refused(house, part)
    assert error["param"] == param
    assert words in error["message"]


async def test_too_many_videos_are_refused(house: House) -> None:
    assert (await refused(house, *[video()] * 5))["code"] == "too_many_videos"


async def test_only_users_show_videos(house: House) -> None:
    answer = await house.ask(messages=[{"role": "system", "content": [video()]}])
    assert answer.json()["error"]["param"] == "messages[0].content[0].type"


async def test_a_budget_is_shared(house: House) -> None:
    used = await usage(house, image(), video(num_frames=8), visual_budget={"max_tiles": 5})
    (picture,), (film,) = used["internvl"]["images"], used["internvl"]["videos"]
    assert picture["tiles"] + film["tiles"] == 5
    assert not picture["reduced"]
    assert film["reduced"]
    same = await usage(house, image(), video(num_frames=8), visual_budget={"max_tokens": 17})
    assert same["prompt_tokens"] == used["prompt_tokens"]


@pytest.mark.parametrize(
    ("budget", "param"),
    [
        ({"max_tiles": 1}, "visual_budget.max_tiles"),
        ({"max_tokens": 5}, "visual_budget.max_tokens"),
        ({"max_tiles": 1, "max_tokens": 1}, "visual_budget"),
        ({}, "visual_budget"),
        ({"max_tiles": 0}, "visual_budget.max_tiles"),
        (3, "visual_budget"),
    ],
)
async def test_a_budget_that_cannot_be_is_named(house: House, budget: Any, param: str) -> None:
    assert (await refused(house, image(), video(), visual_budget=budget))["param"] == param


async def test_a_video_gives_up_frames_to_fit_and_says_so(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(max_model_len=128)))
    used = await usage(house, video(), "What moves?")
    (film,) = used["internvl"]["videos"]
    assert film["reduced"]
    assert 1 <= len(film["frames"]) < 10
    assert used["prompt_tokens"] <= 128 - 16
    # Nothing is kept for more than was asked for.
    longer = await usage(house, video(), "What moves?", max_tokens=1)
    assert len(longer["internvl"]["videos"][0]["frames"]) > len(film["frames"])
    error = await refused(house, video(fit=False), "What moves?")
    assert error["code"] == "context_length_exceeded"
    largest = int(error["message"].split("visual_budget of ")[1].split(" ")[0])
    budget = {"max_tiles": largest}
    used = await usage(house, video(fit=False), "What moves?", visual_budget=budget, max_tokens=1)
    assert used["internvl"]["videos"][0]["tiles"] <= largest
    budget = {"max_tiles": largest + 1}
    error = await refused(house, video(fit=False), "What moves?", visual_budget=budget)
    assert error["code"] == "context_length_exceeded"


async def test_a_picture_gives_up_tiles_only_if_it_may(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(max_model_len=40)))
    words = "x" * 12
    assert (await refused(house, image(), image(), words))["code"] == "context_length_exceeded"
    used = await usage(house, image(fit=True), image(fit=True), words, max_tokens=1)
    assert [one["tiles"] for one in used["internvl"]["images"]] == [1, 1]


async def test_a_budget_holds_for_a_video_with_more_frames_than_its_rate_says(house: House) -> None:
    """Three frames of two seconds at one a second; the decoder would find ten."""
    used = await usage(house, video(end=2.0), "x", visual_budget={"max_tiles": 3})
    assert used["internvl"]["videos"][0]["tiles"] == 3


async def test_a_video_that_cannot_fit_is_not_decoded(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(max_model_len=24)))
    error = await refused(house, video(fit=False), "x")
    assert error["code"] == "context_length_exceeded"
    assert house.media.tiled == 0


async def test_a_slow_server_keeps_no_room_for_tiles_from_others(houses: Houses) -> None:
    house = await houses.open(request_tile_bytes=3 * 48)
    slow = house.media.gate = asyncio.Event()
    first = asyncio.create_task(house.ask(messages=user(image(url="http://slow/picture"))))
    while not house.media.parts:
        await asyncio.sleep(0)
    house.media.gate = asyncio.Event()
    house.media.gate.set()
    async with asyncio.timeout(60):
        await usage(house, image())
    assert not first.done()
    slow.set()
    assert (await first).status_code == 200


# previews


async def test_a_preview_asks_nothing_of_the_engine_and_decodes_nothing(house: House) -> None:
    told = await previewed(house, image(), video(num_frames=4), "What?")
    assert not house.engine.requests
    assert told["fits"] is True
    assert told["largest"] is None
    assert told["visual_tokens"] == (TILES + 4) * PER_TILE
    assert told["prompt_tokens"] == told["text_tokens"] + told["visual_tokens"]
    picture, film = told["parts"]
    assert picture == {
        "param": f"{PART}.image_url.url",
        "type": "image",
        "format": "PNG",
        "width": 8,
        "height": 4,
        "tiles": TILES,
        "tokens": TILES * PER_TILE,
        "reduced": False,
        "orientation": 1,
        "grid": [2, 1],
    }
    assert (film["frames"], film["source_frames"], film["duration"]) == (4, 10, 10.0)
    assert told["cheapest"]["visual_budget"] == {"max_tiles": 2}
    less = await previewed(house, image(), visual_budget={"max_tiles": 1})
    assert less["parts"][0]["reduced"] is True
    assert told["cheapest"]["fits"] is True


async def test_a_preview_says_what_would_fit(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(max_model_len=64)))
    parts = [image(), image(), video(fit=False, num_frames=10), "What?"]
    told = await previewed(house, *parts)
    assert told["fits"] is False
    assert told["largest"]["fits"] is True
    assert (
        told["largest"]["visual_budget"]["max_tiles"]
        > told["cheapest"]["visual_budget"]["max_tiles"]
    )
    used = await usage(house, *parts, visual_budget=told["largest"]["visual_budget"])
    assert used["prompt_tokens"] == told["largest"]["prompt_tokens"] < 64


async def test_a_preview_names_the_parts_in_their_order(house: House) -> None:
    told = await previewed(house, video(num_frames=1), image(), "and", video(), image())
    assert [part["type"] for part in told["parts"]] == ["video", "image", "video", "image"]
    named = [part["param"] for part in told["parts"]]
    assert named == sorted(named)


async def test_a_preview_of_what_never_fits_says_so(houses: Houses) -> None:
    house = await houses.open(FakeEngine(ready=make_ready(max_model_len=24)))
    told = await previewed(house, *[image()] * 4, "What?")
    assert told["fits"] is False
    assert told["largest"] is None
    assert told["cheapest"]["fits"] is False


async def test_a_preview_refuses_what_the_request_would_be_refused_for(house: House) -> None:
    for body, param in (
        ({"messages": user(image(url="data:bad"))}, f"{PART}.image_url.url"),
        ({"messages": user(video(start=10.0))}, f"{PART}.video_url.url"),
        ({"messages": user("x"), "model": "other"}, "model"),
        ({"messages": []}, "messages"),
    ):
        answer = await house.http.post("/v1/internvl/preview", json=body)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
