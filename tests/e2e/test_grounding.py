"""The demo model says where things are, over HTTP: boxes as data, also where it is held to them."""

import itertools
import random
import re
from typing import Any

import pytest
from PIL import Image

from tests.servers import COLOURS, SHAPES, Server, data_uri, draw, encode, part

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = {"type": "internvl_boxes"}
Place = tuple[int, int, int, int]


def ask(server: Server, *content: Any, compare: bool = True, **options: Any) -> list[Any]:
    """The choices of an answer, after checking that the official client's stream says the same,
    unless that is not to be compared."""
    options = {"temperature": 0, "max_completion_tokens": 120} | options
    messages: Any = [{"role": "user", "content": [part(item) for item in content]}]
    with server.client() as client:
        create = client.chat.completions
        answer = create.create(model="internvl-demo", messages=messages, **options)
        if not compare:
            return answer.choices
        with create.stream(model="internvl-demo", messages=messages, **options) as stream:
            streamed = stream.get_final_completion()
    for whole, put_together in zip(answer.choices, streamed.choices, strict=True):
        assert boxes_of(put_together) == boxes_of(whole)
        assert put_together.message.content == whole.message.content
    return answer.choices


def boxes_of(choice: Any) -> list[dict[str, Any]]:
    return getattr(choice.message, "boxes", [])


def scene(seed: int, size: tuple[int, int]) -> tuple[Image.Image, str, Place]:
    """One thing somewhere on a white picture, its name and its place in pixels."""
    source = random.Random(seed)
    colour, shape = source.choice(list(itertools.product(COLOURS, SHAPES)))
    side = source.randint(min(size) // 3, min(size) // 2)
    x, y = source.randint(0, size[0] - side), source.randint(0, size[1] - side)
    picture = Image.new("RGB", size, "white")
    thing = draw(colour, shape, (2 * side, 2 * side))
    picture.paste(thing.crop((side // 2, side // 2, side // 2 + side, side // 2 + side)), (x, y))
    return picture, f"{colour} {shape}", (x, y, x + side, y + side)


def overlap(a: Any, b: Any) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


SIZES = [(112, 112), (448, 448), (300, 200), (150, 300)]


def test_it_finds_most_things_and_tells_their_place_in_pixels(demo_server: Server) -> None:
    """demo/README.md has boxes right in 63 of 100 harder pictures."""
    right = 0
    for seed in range(20):
        size = SIZES[seed % 4]
        picture, name, place = scene(seed, size)
        held = {"response_format": FORMAT} if seed % 3 else {}
        question = f"{QUESTION}<ref>{name}</ref>"
        (choice,) = ask(demo_server, picture, question, compare=seed < 4, **held)
        assert choice.finish_reason == "stop"
        (box,) = boxes_of(choice)
        assert (box["index"], box["image_index"], box["label"]) == (0, 0, name)
        edges = [n * size[i % 2] / 1000 for i, n in enumerate(box["box"])]
        assert all(abs(edge - px) <= 0.5 for edge, px in zip(edges, box["box_px"], strict=True))
        right += overlap(box["box_px"], place) > 0.5
    assert right >= 12


TURNS = {  # EXIF orientation -> how the upright picture is stored
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
}


def test_places_are_those_of_the_picture_turned_upright(demo_server: Server) -> None:
    picture, name, place = scene(0, (300, 200))
    question = f"{QUESTION}<ref>{name}</ref>"
    (upright,) = ask(demo_server, picture, question)
    assert overlap(boxes_of(upright)[0]["box_px"], place) > 0.5
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = data_uri(encode(picture.transpose(turn), exif=exif))
        (turned,) = ask(demo_server, stored, question)
        assert boxes_of(turned) == boxes_of(upright)
    # The reference does not turn pictures: then places are those of the picture as it is stored.
    plain = ask(demo_server, picture.transpose(TURNS[7]), question)
    as_stored = ask(demo_server, stored, question, extra_body={"preprocess": "reference"})
    assert boxes_of(as_stored[0]) == boxes_of(plain[0])
    assert boxes_of(plain[0]) != boxes_of(upright)


NUMBER = "(?:0|[1-9][0-9]{0,2}|1000)"
FOUR = rf"\[{NUMBER}(?:, {NUMBER}){{3}}\]"
WHOLE = rf"(?:<ref>([^<>]{{1,128}})</ref><box>\[{FOUR}(?:, {FOUR})*\]</box>)+"


@pytest.mark.parametrize("options", [{}, {"max_boxes": 3, "labels": ["the sky", "Ärmel"]}])
def test_an_answer_held_to_boxes_is_nothing_else(
    demo_server: Server, options: dict[str, Any]
) -> None:
    complete = 0
    for seed in range(0, 8, 4):
        answers = ask(
            demo_server,
            "Tell me a story.",
            n=4,
            compare=not seed,
            seed=seed,
            temperature=1.5,
            max_completion_tokens=300,
            response_format={**FORMAT, "internvl_boxes": options},
            extra_body={"skip_special_tokens": False},
        )
        for choice in answers:
            text, boxes = choice.message.content or "", boxes_of(choice)
            assert [box["index"] for box in boxes] == list(range(len(boxes)))
            assert len(boxes) == len(re.findall(FOUR, text))
            if choice.finish_reason == "stop":
                complete += 1
                assert boxes
                assert re.fullmatch(WHOLE, text)
                labels = re.findall("<ref>(.+?)</ref>", text)
                assert list(dict.fromkeys(box["label"] for box in boxes)) == list(
                    dict.fromkeys(labels)
                )
                assert len(boxes) <= options.get("max_boxes", len(boxes))
                assert set(labels) <= set(options.get("labels", labels))
            else:
                assert choice.finish_reason == "length"
    assert complete >= 4
