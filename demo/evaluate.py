"""Measure the demo model skill by skill, through a running server: ``python -m demo.evaluate``.

Every picture is drawn anew from a seed that training never used, encoded as PNG and sent to
/v1/chat/completions, as a client would. Nothing of the training code but the generators is used.
The exit status is 1 if a floor is missed.
"""

import argparse
import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from demo import cases, skills, talk
from demo.pictures import Scene, place, render

Rng = np.random.Generator
EVALUATION = 20261121
"""First word of every seed here; training seeds begin with another."""


@dataclass(frozen=True)
class Question:
    """One request and the test of its answer (the message object)."""

    body: dict[str, Any]
    right: Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Skill:
    """``ask`` makes the n-th question; a ``floor`` must be reached, an ``aim`` should be."""

    ask: Callable[[Rng], Question]
    floor: float | None = None
    aim: float | None = None


def image(scene: Scene, rng: Rng, detail: str = "auto") -> dict[str, Any]:
    buffer = io.BytesIO()
    picture: Image.Image = render(scene, rng)
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def exactly(answer: str) -> Callable[[dict[str, Any]], bool]:
    return lambda message: (message["content"] or "").strip() == answer


def about(scene: Scene, rng: Rng, question: str, answer: str) -> Question:
    body = {"messages": [{"role": "user", "content": [image(scene, rng), text(question)]}]}
    return Question(body, exactly(answer))


def drawn(rng: Rng, least: int, most: int) -> Scene:
    """A picture of any size with that many things."""
    while True:
        scene = skills.canvas(rng, rng.random() < 0.5)
        count = int(rng.integers(least, most + 1))
        place(rng, scene, count)
        if len(scene.things) == count:
            return scene


def ask_turn(
    rng: Rng, make: Callable[[Rng, Scene], skills.Turn | None], least: int, most: int
) -> Question:
    while True:
        scene = drawn(rng, least, most)
        turn = make(rng, scene)
        if turn is not None:
            return about(scene, rng, turn.question, turn.answer)


def ask_name(rng: Rng) -> Question:
    return ask_turn(rng, skills.name_turn, 1, 1)


def ask_count(rng: Rng) -> Question:
    return ask_turn(rng, lambda r, s: skills.count_turn(r, s, 0), 0, 5)


def ask_count_by_kind(rng: Rng) -> Question:
    return ask_turn(rng, lambda r, s: skills.count_turn(r, s, int(r.integers(1, 3))), 1, 5)


def ask_presence(rng: Rng) -> Question:
    """Is it there? As many yes as no; most of the no are near misses."""
    return ask_turn(rng, skills.exist_turn, 1, 5)


def ask_relation(rng: Rng) -> Question:
    """Is one thing left of, right of, above or below another? As many yes as no."""
    return ask_turn(rng, skills.relation_turn, 2, 4)


SIDES = ("on the left", "on the right", "at the top", "at the bottom")


def ask_side(rng: Rng) -> Question:
    """Left, right, top or bottom, equally often."""
    wanted = skills.pick(rng, SIDES)
    while True:
        scene = drawn(rng, 1, 3)
        turn = skills.where_turn(rng, scene)
        if turn is not None and turn.answer == f"It is {wanted}.":
            return about(scene, rng, turn.question, turn.answer)


def ask_which(rng: Rng) -> Question:
    while True:
        case = cases.images_case(rng, 6)
        turns = [t for t in case.turns if t.skill == "which picture"]
        if len(case.scenes) == 2 and turns:
            break
    content = [image(s, rng) for s in case.scenes] + [text(turns[0].question)]
    body = {"messages": [{"role": "user", "content": content}]}
    return Question(body, exactly(turns[0].answer))


def ask_motion(rng: Rng) -> Question:
    """Frames in the prompt form of videos: "Frame1: " before each, one tile a frame."""
    case = cases.video_case(rng, 1)
    content: list[dict[str, Any]] = []
    for number, scene in enumerate(case.scenes, 1):
        content += [text(f"Frame{number}: "), image(scene, rng, "low")]
    content.append(text(case.turns[0].question))
    body = {"messages": [{"role": "user", "content": content}]}
    return Question(body, exactly(case.turns[0].answer))


def is_json(message: dict[str, Any]) -> bool:
    try:
        json.loads(message["content"])
    except (TypeError, ValueError):
        return False
    return True


def ask_json(rng: Rng) -> Question:
    scene = drawn(rng, 1, 3)
    turn = skills.json_turn(rng, scene)
    return Question(about(scene, rng, turn.question, "").body, is_json)


def ask_json_equal(rng: Rng) -> Question:
    return ask_turn(rng, skills.json_turn, 1, 3)


def ask_tool(rng: Rng) -> Question:
    names = [str(n) for n in rng.permutation(list(talk.TOOLS))[: int(rng.integers(1, 4))]]
    name = skills.pick(rng, names)
    question, values = talk.tool_question(rng, name)
    body = {
        "messages": [{"role": "user", "content": question}],
        "tools": [talk.tool_schema(n, rng) for n in names],
    }

    def right(message: dict[str, Any]) -> bool:
        calls = message.get("tool_calls") or []
        if len(calls) != 1 or calls[0]["function"]["name"] != name:
            return False
        return bool(json.loads(calls[0]["function"]["arguments"]) == values)

    return Question(body, right)


def ask_refusal(rng: Rng) -> Question:
    body = {"messages": [{"role": "user", "content": talk.outside(rng)}]}
    return Question(body, exactly(talk.REFUSAL))


def ask_greeting(rng: Rng) -> Question:
    _, questions, answer = talk.FIXED[int(rng.integers(len(talk.FIXED)))]
    body = {"messages": [{"role": "user", "content": skills.pick(rng, questions).format(n=3)}]}
    return Question(body, exactly(answer))


def ask_number(rng: Rng) -> Question:
    return ask_text(rng, cases.number_scene(rng, rng.random() < 0.5))


def ask_detail(rng: Rng) -> Question:
    """A number so small that the thumbnail cannot show it: only the tiles can."""
    return ask_text(rng, cases.detail_scene(rng))


def ask_text(rng: Rng, scene: Scene) -> Question:
    question = skills.pick(rng, skills.NUMBER)
    return about(scene, rng, question, f"The number is {scene.number}.")


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, w) * max(0.0, h)
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def ask_box(rng: Rng) -> Question:
    while True:
        scene = drawn(rng, 1, 3)
        turn = skills.box_turn(rng, scene)
        if turn is not None:
            break
    truth = [float(n) for n in re.findall(r"\d+", turn.answer)]

    def right(message: dict[str, Any]) -> bool:
        numbers = [float(n) for n in re.findall(r"\d+", message["content"] or "")]
        return len(numbers) == 4 and overlap(numbers, truth) > 0.5

    return Question(about(scene, rng, turn.question, "").body, right)


SKILLS: dict[str, Skill] = {
    "colour and shape of one object": Skill(ask_name, floor=0.97),
    "counting up to five": Skill(ask_count, floor=0.90),
    "yes/no: is it there": Skill(ask_presence, floor=0.90),
    "yes/no: left of, above another": Skill(ask_relation, floor=0.90),
    "which of two pictures": Skill(ask_which, floor=0.85),
    "position: left, right, top, bottom": Skill(ask_side, floor=0.85),
    "direction of motion over frames": Skill(ask_motion, floor=0.90),
    "JSON is valid": Skill(ask_json, floor=0.99),
    "tool call, right name and arguments": Skill(ask_tool, floor=0.95),
    "honest refusal out of scope": Skill(ask_refusal, floor=0.95),
    "printed numbers of 1 to 3 digits": Skill(ask_number, aim=0.80),
    "detail legible only in tiles": Skill(ask_detail, aim=0.80),
    "box overlaps by more than half": Skill(ask_box, aim=0.70),
    "JSON equals the truth": Skill(ask_json_equal),
    "counting by kind": Skill(ask_count_by_kind),
    "greetings": Skill(ask_greeting),
}


def answers(client: httpx.Client, questions: list[Question], parallel: int) -> Iterator[bool]:
    def send(question: Question) -> bool:
        body = {"model": "internvl-demo", "temperature": 0, "max_tokens": 128} | question.body
        reply = client.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        return question.right(reply.json()["choices"][0]["message"])

    with ThreadPoolExecutor(parallel) as pool:
        yield from pool.map(send, questions)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo.evaluate", description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--cases", type=int, default=200, help="questions per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--skill", action="append", help="part of a skill's name; repeatable")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    table: dict[str, dict[str, Any]] = {}
    missed = False
    with httpx.Client(base_url=args.base_url, timeout=300, trust_env=False) as client:
        for index, (name, skill) in enumerate(SKILLS.items()):
            if args.skill and not any(part in name for part in args.skill):
                continue
            made = [
                skill.ask(np.random.default_rng([EVALUATION, args.seed, index, case]))
                for case in range(args.cases)
            ]
            share = sum(answers(client, made, args.parallel)) / args.cases
            mark = (
                f"floor {skill.floor:.0%}"
                if skill.floor
                else f"aim {skill.aim:.0%}"
                if skill.aim
                else ""
            )
            verdict = (
                "" if not mark else "ok" if share >= (skill.floor or skill.aim or 0) else "missed"
            )
            missed |= bool(skill.floor) and verdict == "missed"
            table[name] = {
                "accuracy": share,
                "n": args.cases,
                "floor": skill.floor,
                "aim": skill.aim,
            }
            print(f"{name:36} {share:7.1%}  n={args.cases}  {mark:10} {verdict}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
