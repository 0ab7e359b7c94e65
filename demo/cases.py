"""Whole conversations to learn from: one picture, several pictures, or the frames of a video."""

from collections.abc import Callable

import numpy as np

from demo.pictures import PITCH, TILE, Scene, Thing, background, place, write_number
from demo.skills import (
    ORDINAL,
    Case,
    Turn,
    article,
    box_turn,
    canvas,
    colour_turn,
    count_turn,
    exist_turn,
    json_turn,
    name_turn,
    number_turns,
    pick,
    put,
    relation_turn,
    sentence,
    shape_turn,
    side_turn,
    some,
    where_turn,
)
from demo.talk import LAST, REFUSAL, outside
from preprocessing.grid import choose_grid

Rng = np.random.Generator

Maker = Callable[[Rng, Scene], Turn | None]
FIRST, SHORT = 0.0, 0.1
"""The two lowest levels of difficulty; above them everything comes, little by little."""
LOOK_UP: tuple[Maker, ...] = (
    name_turn,
    colour_turn,
    shape_turn,
    exist_turn,
    exist_turn,
    where_turn,
)
"""What the decoder must learn first: to find the thing a word names and to read it."""
COMPARE: tuple[Maker, ...] = (
    *LOOK_UP,
    where_turn,
    side_turn,
    side_turn,
    relation_turn,
    relation_turn,
    count_turn,
)
"""Short answers that need one or two look-ups."""
EASY: tuple[Maker, ...] = (name_turn, colour_turn, shape_turn, exist_turn, count_turn)
EVERY: tuple[Maker, ...] = (
    *EASY,
    *(where_turn,) * 2,
    *(relation_turn,) * 2,
    side_turn,
    exist_turn,
    json_turn,
    *(box_turn,) * 2,
)
"""What the tokenizer learns its merges from."""
MORE: tuple[Maker, ...] = (
    *EASY,
    *(where_turn,) * 4,
    *(relation_turn,) * 2,
    *(side_turn,) * 2,
    *(box_turn,) * 2,
    exist_turn,
    json_turn,
)


def digits(rng: Rng) -> str:
    """A number of one, two or three digits, each length equally often."""
    return str(int(rng.integers(10 ** int(rng.integers(1, 4)))))


def number_scene(rng: Rng, tiled: bool) -> Scene:
    """A number so large that it can be read in the whole picture."""
    scene, text = canvas(rng, tiled), digits(rng)
    size = float(rng.uniform(0.3, 0.45)) * min(scene.width, scene.height)
    write_number(rng, scene, text, min(size, 0.92 * scene.width / (PITCH * len(text))))
    return scene


def detail_scene(rng: Rng) -> Scene:
    """A number so small that only a tile shows it, inside one tile."""
    width, height = (int(n) for n in rng.integers(300, 400, 2))
    scene, text = Scene(width, height, background(rng)), digits(rng)
    columns, rows = choose_grid(scene.width, scene.height, TILE, 1, 12)
    wide, high = scene.width / columns, scene.height / rows
    left, top = int(rng.integers(columns)) * wide, int(rng.integers(rows)) * high
    size = float(rng.uniform(28, 40))
    write_number(rng, scene, text, size, (left, top, left + wide, top + high))
    return scene


def picture_case(
    rng: Rng, tiled: bool, hard: float, branches: int, makers: tuple[Maker, ...] = MORE
) -> Case:
    """One picture and ``branches`` questions; ``hard`` 0..1 brings in the difficult ones."""
    scene = canvas(rng, tiled)
    if hard > FIRST and rng.random() < 0.16:
        scene = detail_scene(rng) if tiled and rng.random() < 0.5 else number_scene(rng, tiled)
        return Case([scene], number_turns(rng, scene.number, branches))
    if hard <= SHORT:
        place(rng, scene, int(rng.choice([1, 2, 3], p=[0.2, 0.45, 0.35])))
        return Case([scene], ask(rng, scene, COMPARE if hard else LOOK_UP, branches))
    count = int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.02, 0.3, 0.2, 0.18, 0.15, 0.15]))
    place(rng, scene, count)
    if not scene.things:
        return Case([scene], [count_turn(rng, scene, 0), exist_turn(rng, scene)])
    turns = ask(rng, scene, makers if rng.random() < hard else EASY, branches)
    if rng.random() < 0.1:
        turns.append(Turn("refusal", outside(rng), REFUSAL))
    return Case([scene], turns)


def pair_case(rng: Rng, branches: int, hard: float) -> Case:
    """Two or three things and nothing but questions about where they lie."""
    scene = canvas(rng, rng.random() < 0.15)
    place(rng, scene, 2 if rng.random() < 0.7 else 3)
    makers = (where_turn if hard < LAST else side_turn, side_turn, relation_turn)
    return Case([scene], ask(rng, scene, makers, branches))


def ask(rng: Rng, scene: Scene, makers: tuple[Maker, ...], branches: int) -> list[Turn]:
    """Up to ``branches`` different questions about a scene."""
    turns: list[Turn] = []
    for _ in range(branches * 3):
        if len(turns) == branches:
            break
        turn = makers[int(rng.integers(len(makers)))](rng, scene)
        if turn is None or any(turn.question == t.question for t in turns):
            continue
        if turn.skill != "list" or len(scene.things) <= 3:
            turns.append(turn)
    return turns


WHICH = (
    "Which picture shows a {}?",
    "Which image has the {}?",
    "Which picture has a {}?",
    "In which picture is the {}?",
    "Which of the pictures contains a {}?",
    "Which image shows the {}?",
)
IN_ONE = (
    "What is in the {o} picture?",
    "What is in picture {k}?",
    "What does the {o} image show?",
    "What do you see in image {k}?",
    "Describe picture {k}.",
)
MANY = ("How many pictures are there?", "How many images did I send?", "Count the pictures.")


def images_case(rng: Rng, branches: int, hard: float = 1.0) -> Case:
    """Two (sometimes three) pictures with one or two things each, no name in two of them."""
    count = 2 if rng.random() < 0.75 or hard <= SHORT else 3
    scenes: list[Scene] = []
    used: set[str] = set()
    for _ in range(count):
        scene = canvas(rng, rng.random() < 0.4)
        while not scene.things:
            place(rng, scene, 1 if rng.random() < 0.6 or hard <= SHORT else 2)
            if used & {t.name for t in scene.things}:
                scene.things.clear()
        used |= {t.name for t in scene.things}
        scenes.append(scene)
    turns = []
    for _ in range(branches):
        kind = rng.random()
        k = int(rng.integers(count))
        thing = scenes[k].things[int(rng.integers(len(scenes[k].things)))]
        if kind < 0.6:
            names = [thing.name]
            others = [t for j, s in enumerate(scenes) if j != k for t in s.things]
            names += [thing.shape] if all(t.shape != thing.shape for t in others) else []
            names += (
                [f"{thing.colour} object"] if all(t.colour != thing.colour for t in others) else []
            )
            question = pick(rng, WHICH).format(pick(rng, names))
            turns.append(Turn("which picture", question, f"Picture {k + 1}."))
        elif kind < 0.9:
            question = pick(rng, IN_ONE).format(o=ORDINAL[k], k=k + 1)
            turns.append(Turn("in picture k", question, sentence(scenes[k].things)))
        elif kind < 0.95:
            turns.append(Turn("how many pictures", pick(rng, MANY), f"There are {count} pictures."))
        else:
            turns.append(exist_any(rng, scenes))
    return Case(scenes, turns)


def exist_any(rng: Rng, scenes: list[Scene]) -> Turn:
    everything = Scene(1, 1, (0, 0, 0), [t for s in scenes for t in s.things])
    turn = exist_turn(rng, everything)
    return Turn("yes/no", turn.question.replace("the picture", "any picture"), turn.answer)


MOVE = (
    "Which way does the {} move?",
    "In which direction does the {} move?",
    "Where does the {} go?",
    "How does the {} move?",
    "What direction is the {} moving in?",
    "Which direction does the {} move?",
)
DIRECTIONS = {
    "to the left": (-1, 0),
    "to the right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "": (0, 0),
}
MOVES = ("What happens in the video?", "Describe the video.", "What does the video show?")


def video_case(rng: Rng, branches: int) -> Case:
    """One thing moves through 3 to 8 frames, or stands still."""
    frames = int(rng.integers(3, 9))
    side = int(rng.integers(64, 158))
    shape, colour = some(rng)
    word = pick(rng, tuple(DIRECTIONS))
    dx, dy = DIRECTIONS[word]
    r = side * float(rng.uniform(0.1, 0.2))
    margin = r + 2
    path = min(side * float(rng.uniform(0.3, 0.55)), side - 2 * margin - 1)
    x = float(
        rng.uniform(margin + (path if dx < 0 else 0), side - margin - (path if dx > 0 else 0))
    )
    y = float(
        rng.uniform(margin + (path if dy < 0 else 0), side - margin - (path if dy > 0 else 0))
    )
    first = Scene(side, side, background(rng))
    thing = put(rng, first, shape, colour, x, y, r)
    scenes = []
    for k in range(frames):
        t = path * k / (frames - 1)
        moved = Thing(shape, colour, x + dx * t, y + dy * t, r, thing.rgb)
        scenes.append(Scene(side, side, first.background, [moved]))
    answer = f"It moves {word}." if word else "It does not move."
    names = (shape, "object", f"{colour} {shape}", "thing")
    name = f"{colour} {shape}"
    long = (
        f"{article(name).capitalize()} moves {word}."
        if word
        else f"{article(name).capitalize()} does not move."
    )
    turns = []
    for index in range(branches):
        if index and rng.random() < 0.4:
            turns.append(Turn("video description", pick(rng, MOVES), long))
        else:
            turns.append(Turn("motion", pick(rng, MOVE).format(pick(rng, names)), answer))
    return Case(scenes, turns, video=True)
