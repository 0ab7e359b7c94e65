"""Boxes beside the text of an answer, whole and streamed, and what asks for them."""

import json
from typing import Any

import pytest

from tests.api.conftest import House, Houses
from tests.api.test_chat import CALL, HELLO, WEATHER, events, picture
from tests.api.test_errors import check_refusal, error_of
from tests.fake_engine import CHAT, FakeEngine, make_ready, say
from tests.small_tokenizer import tokenizer_json

FORMAT: Any = {"type": "internvl_boxes"}
SAID = "One: <ref>red circle</ref><box>[[0, 0, 500, 1000], [250, 500, 1200, 0]]</box> <box>[[1, 2"
BOXES = [
    {
        "index": 0,
        "label": "red circle",
        "box": [0, 0, 500, 1000],
        "box_px": [0, 0, 4, 4],
        "image_index": 0,
    },
    {
        "index": 1,
        "label": "red circle",
        "box": [250, 500, 1200, 0],
        "box_px": [2, 0, 8, 2],
        "image_index": 0,
    },
]  # every picture here has 8 by 4 pixels


def shown(*names: str, text: str = "Where?") -> dict[str, Any]:
    parts = [*map(picture, names), {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}]}


def asked(**options: Any) -> dict[str, Any]:
    return {"response_format": {**FORMAT, "internvl_boxes": options}}


async def boxes_of(house: House, **body: Any) -> list[list[dict[str, Any]] | None]:
    """Of each choice; None where an answer has none. A stream says the same."""
    whole = (await house.ask(**body)).json()["choices"]
    streamed: list[list[dict[str, Any]]] = [[] for _ in whole]
    for event in events((await house.ask(**body, stream=True)).text):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("boxes", ())
    found = [choice["message"].get("boxes") for choice in whole]
    assert [boxes or [] for boxes in found] == streamed
    return found


@pytest.mark.parametrize("n", [1, 2])
async def test_boxes_are_told_apart_from_the_text(house: House, n: int) -> None:
    house.engine.script = say(SAID)
    assert await boxes_of(house, **shown("a"), n=n) == [BOXES] * n
    (choice, *_) = (await house.ask(**shown("a"))).json()["choices"]
    assert choice["message"]["content"] == (
        "One: red circle[[0, 0, 500, 1000], [250, 500, 1200, 0]] [[1, 2"
    )
    (choice, *_) = (await house.ask(**shown("a"), skip_special_tokens=False)).json()["choices"]
    assert choice["message"]["content"] == SAID
    assert choice["message"]["boxes"] == BOXES


async def test_an_answer_without_boxes_has_no_such_field(house: House) -> None:
    assert await boxes_of(house, **shown("a")) == [None]
    house.engine.script = say("<ref>a</ref><box>[[1, 2, 3]]</box>")
    assert await boxes_of(house, **shown("a")) == [None]


async def test_a_box_is_sent_when_it_is_complete(house: House) -> None:
    house.engine.script = say(SAID)
    text, seen = "", []
    for event in events((await house.ask(**shown("a"), stream=True)).text):
        delta = event["choices"][0]["delta"]
        text += delta.get("content", "")
        seen += [(box, text) for box in delta.get("boxes", ())]
    (first, before), (second, then) = seen
    assert [first, second] == BOXES
    assert before.count("]") == 1
    assert "[250, 500, 1200, 0]" in then


async def test_the_official_client_puts_boxes_together(house: House) -> None:
    house.engine.script = say(SAID)
    options: Any = {"model": "tiny", **shown("a"), **asked(max_boxes=2)}
    async with house.sdk.chat.completions.stream(**options) as stream:
        final = await stream.get_final_completion()
    whole = await house.sdk.chat.completions.create(**options)
    for answer in (final, whole):
        assert getattr(answer.choices[0].message, "boxes", None) == BOXES


async def test_boxes_end_where_the_answer_does(house: House) -> None:
    house.engine.script = say(SAID)
    assert await boxes_of(house, **shown("a"), stop=["1000], ["]) == [BOXES[:1]]
    house.engine.script = say(SAID, finish="length")
    assert await boxes_of(house, **shown("a")) == [BOXES]


async def test_calls_and_boxes_go_together(house: House) -> None:
    house.engine.script = say(SAID + "</box>\n" + CALL)
    body = {**shown("a"), "tools": [WEATHER]}
    assert await boxes_of(house, **body) == [BOXES]
    (choice,) = (await house.ask(**body)).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_a_box_may_begin_in_the_message_that_is_continued(house: House) -> None:
    house.engine.script = say("0, 500, 1000]]</box>")
    begun = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box> <ref>red circle</ref><box>[[0, "
    body = shown("a", text="<ref>dog</ref><box>[[")
    body["messages"].append({"role": "assistant", "content": begun})
    for options in ({"n": 2}, {"echo": True}):
        found = await boxes_of(house, **body, **options, continue_final_message=True)
        assert found == [BOXES[:1]] * options.get("n", 1)
    question = shown("a", text="Where is the <ref>dog</ref>?")["messages"]
    unnamed = [*question, {"role": "assistant", "content": "<box>[[0, "}]
    found = await boxes_of(house, messages=unnamed, continue_final_message=True)
    assert found == [[BOXES[0] | {"label": None}]]
    house.engine.script = say(SAID)  # a turn of its own remembers nothing of the others
    assert await boxes_of(house, **body) == [BOXES]


async def test_no_pixels_are_told_of_a_picture_that_is_not_known(houses: Houses) -> None:
    house = await houses.open(FakeEngine(make_ready(CHAT), say(SAID)))

    async def place(*names: str, **body: Any) -> tuple[int | None, list[int] | None]:
        (boxes,) = await boxes_of(house, **shown(*names), **body)
        assert boxes is not None
        assert {box["image_index"] for box in boxes} == {boxes[0]["image_index"]}
        return boxes[0]["image_index"], boxes[0]["box_px"]

    assert await place() == (None, None)
    assert await place("a") == (0, [0, 0, 4, 4])
    assert await place("a", "b") == (None, None)
    assert await place("a", "b", **asked(image_index=1)) == (1, [0, 0, 4, 4])
    house.engine.script = say("Image-2: " + SAID)
    assert await place("a", "b", "c") == (1, [0, 0, 4, 4])
    assert await place("a", "b", "c", **asked(image_index=2)) == (2, [0, 0, 4, 4])
    unnamed = await houses.open(FakeEngine(make_ready(), say("Image-2: " + SAID)))
    (boxes,) = await boxes_of(unnamed, **shown("a", "b"))
    assert boxes is not None
    assert boxes[0]["image_index"] is None


async def test_a_box_may_be_in_a_video_if_there_is_one(house: House) -> None:
    house.engine.script = say(SAID)
    body = shown("a")
    film = {"type": "video_url", "video_url": {"url": "data:video", "num_frames": 1}}
    body["messages"][0]["content"].append(film)
    unknown = {"box_px": None, "image_index": None}
    assert await boxes_of(house, **body) == [[box | unknown for box in BOXES]]
    assert await boxes_of(house, **body, **asked(image_index=0)) == [BOXES]


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"labels": []}, "labels", "empty"),
        ({"labels": ["a"] * 65}, "labels", "64"),
        ({"labels": "a"}, "labels", "array"),
        ({"labels": [""]}, "labels[0]", "empty"),
        ({"labels": ["a" * 129]}, "labels[0]", "128"),
        ({"labels": ["a", " b"]}, "labels[1]", "blank"),
        ({"labels": [3]}, "labels[0]", "string"),
        ({"max_boxes": 0}, "max_boxes", "1"),
        ({"max_boxes": 101}, "max_boxes", "100"),
        ({"max_boxes": True}, "max_boxes", "integer"),
        ({"image_index": -1}, "image_index", "0"),
        ({"image_index": 1}, "image_index", "number of pictures, 1"),
    ],
)
async def test_what_cannot_be_asked_of_boxes_is_refused(
    house: House, options: dict[str, Any], param: str, says: str
) -> None:
    body = {**shown("a"), **asked(**options)}
    await check_refusal(house, body, f"response_format.internvl_boxes.{param}", says)


async def test_boxes_are_one_demand_among_others(house: House) -> None:
    await check_refusal(
        house, {**asked(), "guided_regex": "a"}, "guided_regex", "response_format and guided_regex"
    )
    assert (await house.ask(response_format=FORMAT, messages=HELLO)).status_code == 200
    assert (await house.ask(**asked(labels=["ä <box>", 'b"\n!'], max_boxes=1))).status_code == 200
    first, second = (request.sampling.grammar for request in house.engine.requests)
    assert first is not None
    assert second is not None
    assert "next*" in first.text
    assert r'label: "ä <box>" | "b\"\n!"' in second.text


async def test_a_checkpoint_without_tokens_for_boxes_says_so(houses: Houses) -> None:
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<ref>"]
    (houses.folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    house = await houses.open()
    error = error_of(await house.ask(response_format=FORMAT))
    assert error["param"] == "response_format.type"
    assert error["code"] == "unsupported_parameter"
