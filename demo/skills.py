"""Questions and their answers about scenes: the whole world of the demo model.

Every skill draws a picture for itself, so that its answers are balanced, and may add further
questions about the same picture. Answers are short and have one wording, so that an exact match
is a fair measure. Questions have many.
"""

import json
from dataclasses import dataclass, field

import numpy as np

from demo.pictures import (
    BOX_BINS,
    NAMES,
    SHAPES,
    Scene,
    Thing,
    background,
    far,
    tint,
)

Rng = np.random.Generator


@dataclass
class Turn:
    """One question with its only right answer; ``skill`` names what it tests.

    ``reply`` is a turn that follows in the same conversation.
    """

    skill: str
    question: str
    answer: str
    reply: "Turn | None" = None


@dataclass
class Case:
    """Pictures, in order, and independent questions about them."""

    scenes: list[Scene]
    turns: list[Turn] = field(default_factory=list)
    video: bool = False
    system: str | None = None


def pick(rng: Rng, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def sentence(things: list[Thing]) -> str:
    """ "A red circle, a blue star and a green square.", from left to right."""
    names = [article(t.name) for t in sorted(things, key=lambda t: t.x)]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return text[0].upper() + text[1:] + "."


def plural(shape: str, count: int) -> str:
    if count == 1:
        return shape
    return shape + ("es" if shape in ("cross",) else "s")


def canvas(rng: Rng, tiled: bool) -> Scene:
    if not tiled:
        side = int(rng.integers(64, 158))
        return Scene(side, side, background(rng))
    kind = rng.random()
    if kind < 0.25:
        side = int(rng.integers(160, 460))
        return Scene(side, side, background(rng))
    if kind < 0.5:
        w, h = [(300, 200), (320, 240), (400, 300), (448, 448), (256, 256), (200, 300), (640, 480)][
            int(rng.integers(7))
        ]
        return Scene(w, h, background(rng))
    return Scene(int(rng.integers(120, 460)), int(rng.integers(120, 400)), background(rng))


WHAT = (
    "What is in this picture?",
    "What is in the picture?",
    "What do you see?",
    "What can you see in this image?",
    "Describe this picture.",
    "Describe the image.",
    "What is this?",
    "What does the picture show?",
    "What is shown here?",
    "Tell me what you see.",
    "What's in the image?",
    "Describe what you see.",
    "What is in this image?",
    "Name the object in the picture.",
    "What objects are in the picture?",
    "Please describe the picture.",
    "what is in the picture",
    "What shapes do you see?",
    "What shape is this and what colour is it?",
    "What shape is this and what color is it?",
)
COLOUR = (
    "What colour is the {}?",
    "What color is the {}?",
    "Which colour does the {} have?",
    "Tell me the colour of the {}.",
    "What is the color of the {}?",
    "The {} has which colour?",
)
ONLY_COLOUR = (
    "What colour is it?",
    "What color is it?",
    "Which colour is this?",
    "What colour is the object?",
    "What color is the shape?",
    "What colour is this shape?",
)
SHAPE = (
    "What shape is the {} object?",
    "What is the {} thing?",
    "Which shape is {}?",
    "What shape is {}?",
    "What is the shape of the {} object?",
    "The {} object is what shape?",
)
ONLY_SHAPE = (
    "What shape is it?",
    "What shape is this?",
    "Which shape is shown?",
    "What shape is in the picture?",
    "Name the shape.",
)
COUNT = (
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "How many {} are in the picture?",
    "What is the number of {}?",
    "How many {} can you see in this image?",
)
THINGS = ("objects", "shapes", "things")
EXIST = (
    "Is there a {} in the picture?",
    "Is there a {}?",
    "Do you see a {}?",
    "Can you see a {}?",
    "Does the picture show a {}?",
    "Does the image contain a {}?",
)
WHERE = (
    "Where is the {}?",
    "Where in the picture is the {}?",
    "In which part of the picture is the {}?",
    "What is the position of the {}?",
    "Where can I find the {}?",
    "Where is the {} in this image?",
)
RELATION = {
    "left": ("Is the {} left of the {}?", "Is the {} to the left of the {}?"),
    "right": ("Is the {} right of the {}?", "Is the {} to the right of the {}?"),
    "above": ("Is the {} above the {}?", "Is the {} higher than the {}?"),
    "below": ("Is the {} below the {}?", "Is the {} under the {}?"),
}
SIDE = {
    ("left", "right"): (
        "Is the {} left or right of the {}?",
        "Is the {} to the left or to the right of the {}?",
    ),
    ("above", "below"): (
        "Is the {} above or below the {}?",
        "Is the {} higher or lower than the {}?",
    ),
}
NUMBER = (
    "What number is written here?",
    "What number is in the picture?",
    "Read the number.",
    "Which number do you see?",
    "What does it say?",
    "What is written in the picture?",
    "What number is this?",
    "Read the text in the image.",
)
DIGIT = (
    "What is the {} digit?",
    "What is the {} digit of the number?",
    "Which digit is the {} one?",
    "Read the {} digit.",
)
DIGITS = (
    "How many digits does the number have?",
    "How many digits are there?",
    "Count the digits.",
)
ORDINAL = ("first", "second", "third")
JSON = (
    "Answer in JSON: what is in the picture?",
    "Describe the picture as JSON.",
    "Give me the objects as JSON.",
    "List the objects in JSON.",
    "Reply with JSON only: what do you see?",
    "Return a JSON list of the shapes and colours.",
    "Describe the image in JSON format.",
)
BOX = (
    "Please provide the bounding box coordinate of the region this sentence describes: "
    "<ref>{}</ref>",
    "Give the bounding box of the <ref>{}</ref>.",
)


def put(rng: Rng, scene: Scene, shape: str, colour: str, x: float, y: float, r: float) -> Thing:
    """One thing at an exact place; the background gives way to its colour."""
    rgb = tint(rng, colour)
    while not all(far(c, scene.background) for c in [rgb, *(t.rgb for t in scene.things)]):
        scene.background = background(rng)
        if rng.random() < 0.1:
            scene.background = (128, 128, 128)
    scene.things.append(Thing(shape, colour, x, y, r, rgb))
    return scene.things[-1]


def some(rng: Rng) -> tuple[str, str]:
    return pick(rng, SHAPES), pick(rng, NAMES)


def unique(scene: Scene) -> list[Thing]:
    """Things whose name (colour and shape) stands once in the scene."""
    names = [t.name for t in scene.things]
    return [t for t in scene.things if names.count(t.name) == 1]


def one_and_only(scene: Scene, key: str) -> list[Thing]:
    values = [getattr(t, key) for t in scene.things]
    return [t for t in scene.things if values.count(getattr(t, key)) == 1]


def name_turn(rng: Rng, scene: Scene) -> Turn:
    skill = "name" if len(scene.things) == 1 else "list"
    return Turn(skill, pick(rng, WHAT), sentence(scene.things))


def colour_turn(rng: Rng, scene: Scene) -> Turn | None:
    things = one_and_only(scene, "shape")
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    if len(scene.things) == 1 and rng.random() < 0.5:
        return Turn("attribute", pick(rng, ONLY_COLOUR), f"The {thing.shape} is {thing.colour}.")
    question = pick(rng, COLOUR).format(thing.shape)
    return Turn("attribute", question, f"The {thing.shape} is {thing.colour}.")


def shape_turn(rng: Rng, scene: Scene) -> Turn | None:
    things = one_and_only(scene, "colour")
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    if len(scene.things) == 1 and rng.random() < 0.5:
        return Turn("attribute", pick(rng, ONLY_SHAPE), f"It is {article(thing.shape)}.")
    question = pick(rng, SHAPE).format(thing.colour)
    return Turn("attribute", question, f"It is {article(thing.shape)}.")


def count_answer(count: int, noun: str) -> str:
    if count == 1:
        return f"There is 1 {noun}."
    return f"There are {count} {noun}."


def count_turn(rng: Rng, scene: Scene, kind: int | None = None) -> Turn:
    kind = int(rng.integers(3)) if kind is None else kind
    present = scene.things and rng.random() < 0.8
    thing = scene.things[int(rng.integers(len(scene.things)))] if scene.things else None
    if kind == 0:
        noun = pick(rng, THINGS)
        count = len(scene.things)
        single = noun[:-1]
        skill = "count"
    elif kind == 1:
        shape = thing.shape if present and thing else pick(rng, SHAPES)
        count = sum(t.shape == shape for t in scene.things)
        noun, single, skill = plural(shape, 2), shape, "count by kind"
    else:
        colour = thing.colour if present and thing else pick(rng, NAMES)
        count = sum(t.colour == colour for t in scene.things)
        noun, single, skill = f"{colour} objects", f"{colour} object", "count by kind"
    answer = count_answer(count, single if count == 1 else noun)
    return Turn(skill, pick(rng, COUNT).format(noun), answer)


def exist_turn(rng: Rng, scene: Scene) -> Turn:
    """Half yes, half no; most of the no are near misses (colour there, shape there, not both)."""
    names = {t.name for t in scene.things}
    kind = rng.random()
    if scene.things and rng.random() < 0.5:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        what = thing.name if kind < 0.6 else thing.shape if kind < 0.8 else f"{thing.colour} object"
        return Turn("yes/no", pick(rng, EXIST).format(what), "Yes.")
    shapes, colours = {t.shape for t in scene.things}, {t.colour for t in scene.things}
    for _ in range(20):
        shape, colour = some(rng)
        if kind < 0.6:
            if scene.things and rng.random() < 0.7:
                thing = scene.things[int(rng.integers(len(scene.things)))]
                shape, colour = (
                    (thing.shape, colour) if rng.random() < 0.5 else (shape, thing.colour)
                )
            if f"{colour} {shape}" not in names:
                return Turn("yes/no", pick(rng, EXIST).format(f"{colour} {shape}"), "No.")
        elif kind < 0.8 and shape not in shapes:
            return Turn("yes/no", pick(rng, EXIST).format(shape), "No.")
        elif kind >= 0.8 and colour not in colours:
            return Turn("yes/no", pick(rng, EXIST).format(f"{colour} object"), "No.")
    return exist_turn(rng, scene)


def region(scene: Scene, thing: Thing) -> str | None:
    """Where a thing is in a 3x3 raster; None near the lines, where people would disagree."""
    u, v = thing.x / scene.width, thing.y / scene.height
    words = []
    for value, low, high in ((v, "top", "bottom"), (u, "left", "right")):
        if min(abs(value - 1 / 3), abs(value - 2 / 3)) < 0.035:
            return None
        words.append(low if value < 1 / 3 else high if value > 2 / 3 else "")
    vertical, horizontal = words
    if vertical and horizontal:
        return f"in the {vertical} {horizontal}"
    if vertical:
        return f"at the {vertical}"
    return f"on the {horizontal}" if horizontal else "in the middle"


def where_turn(rng: Rng, scene: Scene) -> Turn | None:
    things = [t for t in unique(scene) if region(scene, t)]
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    names = [thing.name]
    names += [thing.shape] if thing in one_and_only(scene, "shape") else []
    names += [f"{thing.colour} object"] if thing in one_and_only(scene, "colour") else []
    name = pick(rng, names)
    return Turn("where", pick(rng, WHERE).format(name), f"It is {region(scene, thing)}.")


def related(rng: Rng, scene: Scene) -> tuple[Thing, Thing, tuple[str, str], str] | None:
    """Two things, the axis on which they lie clearly apart, and where the first lies on it."""
    things = unique(scene)
    if len(things) < 2:
        return None
    i, j = rng.permutation(len(things))[:2]
    a, b = things[int(i)], things[int(j)]
    dx, dy = a.x - b.x, a.y - b.y
    margin = 0.08 * min(scene.width, scene.height)
    horizontal = abs(dx) > abs(dy)
    if max(abs(dx), abs(dy)) < margin or 0.8 < abs(dx) / (abs(dy) + 1e-6) < 1.25:
        return None
    axis = ("left", "right") if horizontal else ("above", "below")
    return a, b, axis, axis[int((dx if horizontal else dy) > 0)]


def relation_turn(rng: Rng, scene: Scene) -> Turn | None:
    found = related(rng, scene)
    if found is None:
        return None
    a, b, axis, true = found
    asked = pick(rng, axis)
    question = pick(rng, RELATION[asked]).format(a.name, b.name)
    return Turn("relation", question, "Yes." if asked == true else "No.")


def side_turn(rng: Rng, scene: Scene) -> Turn | None:
    """The same without yes and no, which is easier to learn."""
    found = related(rng, scene)
    if found is None:
        return None
    a, b, axis, true = found
    return Turn("side", pick(rng, SIDE[axis]).format(a.name, b.name), f"{true.capitalize()}.")


def number_turns(rng: Rng, text: str, count: int) -> list[Turn]:
    """What is written, and its digits one by one."""
    turns = [Turn("number", pick(rng, NUMBER), f"The number is {text}.")]
    for place in rng.permutation(len(text))[: count - 1]:
        name = ORDINAL[int(place)]
        answer = f"The {name} digit is {text[int(place)]}."
        turns.append(Turn("digit", pick(rng, DIGIT).format(name), answer))
    if len(turns) < count:
        noun = "digit" if len(text) == 1 else "digits"
        turns.append(Turn("digits", pick(rng, DIGITS), count_answer(len(text), noun)))
    return turns


def json_turn(rng: Rng, scene: Scene) -> Turn:
    items = [
        {"shape": t.shape, "colour": t.colour} for t in sorted(scene.things, key=lambda t: t.x)
    ]
    return Turn("json", pick(rng, JSON), json.dumps(items[0] if len(items) == 1 else items))


def box_turn(rng: Rng, scene: Scene) -> Turn | None:
    things = unique(scene)
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    x0, y0, x1, y1 = thing.box
    size = (scene.width, scene.height, scene.width, scene.height)
    numbers = [
        str(round(min(1, max(0, v / s)) * (BOX_BINS - 1)) * 40)
        for v, s in zip((x0, y0, x1, y1), size, strict=True)
    ]
    answer = f"<ref>{thing.name}</ref><box>[[{', '.join(numbers)}]]</box>"
    return Turn("box", pick(rng, BOX).format(thing.name), answer)
