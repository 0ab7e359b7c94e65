"""``internvl chat`` in a real terminal and in pipes."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_api import Answer, Api
from tests.servers import ROOT, Server, draw, encode
from tests.terminal import CTRL_C, CTRL_D, Terminal


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": []} | fields).encode() + b"\n\n"


def stream(*texts: str, hold: threading.Event | None = None) -> Iterator[bytes]:
    """An answer; the last text comes when it may."""
    for index, text in enumerate(texts):
        if hold is not None and index == len(texts) - 1:
            hold.wait(60)
        yield event(choices=[{"delta": {"content": text}}])
    yield event(usage={"prompt_tokens": 7, "completion_tokens": 3})
    yield b"data: [DONE]\n\n"


def pipe(
    *words: str, question: str | bytes = "What is this?"
) -> "subprocess.CompletedProcess[bytes]":
    text = question.encode() if isinstance(question, str) else question
    command = [sys.executable, "-m", "server", "chat", *words]
    return subprocess.run(
        command, cwd=ROOT, input=text, capture_output=True, check=False, timeout=120
    )


def test_a_question_from_a_pipe_is_answered_about_a_picture(
    demo_server: Server, tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(encode(draw("blue", "square")))
    picture = str(tmp_path / "cat.png")
    done = pipe("--url", demo_server.url, picture, question="What is this?")
    assert done.returncode == 0
    text = done.stdout.decode()
    assert "blue" in text
    assert "square" in text
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert done.stderr == b""


def test_a_conversation_in_a_terminal(demo_server: Server, tmp_path: Path) -> None:
    """Everything that has no answer to wait for, and answers that build on each other."""
    for name, colour in (("one picture.png", "red"), ("two.png", "green")):
        (tmp_path / name).write_bytes(encode(draw(colour, "circle")))
    saved = tmp_path / "saved.json"
    with Terminal(["chat", "--url", demo_server.url], tmp_path) as terminal:
        terminal.expect("internvl-demo; /help")
        terminal.expect("> ")
        for typed, shown in (
            ("/help", "/regenerate"),
            ("/set temperature 0", "> "),
            ("/set", "temperature 0"),
            (f"/image {tmp_path}/one\\ picture.png", "attached: "),
            ("What is this?", "red"),
            ("/regenerate", "red"),
            ("/image two.png", "two.png is no file"),
            (f'/image "{tmp_path}/two.png"', "attached: "),
            ("/dance", "no command is called /dance"),
            ("/set messages 1", "not for you to set"),
            (f"/save {saved}", "saved: "),
            (f"/save {saved}", "cannot be written"),
            ("/clear", "forgotten"),
            ("/regenerate", "nothing was asked yet"),
            ("/set max_tokens -1", "> "),
            ("Hello!", "400: max_tokens"),
        ):
            terminal.type(typed + "\n")
            terminal.expect(typed.split()[0])  # the terminal's own echo
            terminal.expect(shown)
            if shown != "> ":
                terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
    assert "tokens in" in terminal.shown
    assert "Traceback" not in terminal.shown
    body = json.loads(saved.read_text())
    assert body["temperature"] == 0
    question, answer = body["messages"]
    assert [part["type"] for part in question["content"]] == ["image_url", "text"]
    assert answer["role"] == "assistant"
    history = tmp_path / ".local" / "state" / "internvl" / "chat_history"
    assert "What is this?" in history.read_text()
    assert history.stat().st_mode & 0o77 == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    never = threading.Event()
    answers = iter([stream("It begins", " and ends", hold=never), stream("Next.")])
    with (
        Api(lambda *_: (200, {}, next(answers))) as api,
        Terminal(["chat", "--url", api.url], tmp_path) as terminal,
    ):
        terminal.expect("> ")
        terminal.type("one\n")
        terminal.expect("It begins")
        terminal.type(CTRL_C)
        terminal.expect("stopped")
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.interrupt("leaves")
        terminal.expect("> ")
        terminal.type("two\n")
        terminal.expect("Next.")
        terminal.expect("7 tokens in, 3 out")
        never.set()
        terminal.expect("> ")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    assert [message["content"] for message in api.asked[1]["messages"]] == [
        *("one", "It begins", "two")
    ]


HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\x1bP1;1|\x90 \u202etxt.exe\r\n\n"
    "[good](http://evil.example/\x1b]8) &#27;]0;owned2 &#x202e;gnp &#155;31m &#13; <b>kept</b>\n\n"
    "```\x1b]52;c;aGk=\x07\ncode \x1b[5m\n```\n\n<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
)


@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_no_answer_gives_commands_to_the_terminal(tmp_path: Path, cut: int) -> None:
    def answer(*_: Any) -> Answer:
        pieces = [HOSTILE[at : at + cut] for at in range(0, len(HOSTILE), cut)]
        return 200, {}, stream(*pieces)

    with Api(answer) as api, Terminal(["chat", "--url", api.url], tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type("Hi\n")
        terminal.expect("tokens/s")
        assert terminal.leave() == 0
        piped = pipe("--url", api.url).stdout.decode()
    for text in (terminal.shown, piped):
        for begin in ("\x1b]0", "\x1b]52", "\x1bP", "\x1b[5m", "\x1b]8", "\x9b", "\x90", "\u202e"):
            assert begin not in text, begin
        assert "\N{SYMBOL FOR ESCAPE}]0;owned" in text
        assert "<ref>cat</ref><box>" in text
        assert "http://evil.example/" in text
    assert "\x1b" not in piped
    assert "\x1b[2J" not in terminal.shown


def test_what_cannot_be_sent_ends_no_conversation(tmp_path: Path) -> None:
    with (
        Api(lambda *_: (200, {}, stream("Good", " day"))) as api,
        Terminal(["chat", "--url", api.url], tmp_path) as terminal,
    ):
        terminal.expect("> ")
        for value in ("NaN", "1e999", '"\\ud800"'):
            terminal.type(f"/set top_p {value}\n")
            terminal.expect("top_p")
            terminal.expect("> ")
            terminal.type("Hi\n")
            terminal.expect("cannot be sent")
            terminal.expect("> ")
        terminal.type("/set top_p\n")
        terminal.expect("> ")
        terminal.type("Hi\n")
        terminal.expect("Good day")
        assert terminal.leave() == 0
    assert len(api.asked) == 1


def test_neither_a_server_s_errors_do(tmp_path: Path) -> None:
    said = "no\x1b]0;owned\x07\nsuch \u202emodel"
    for answer in (
        (404, {}, {"error": {"message": said}}),
        (500, {}, said.encode()),
        (200, {}, iter([event(error={"message": said})])),
        (200, {}, iter([b"data: {broken\n\n"])),
        (200, {}, iter([b"data: [1]\n\n"])),
    ):
        with Api(lambda *_, answer=answer: answer) as api:
            done = pipe("--url", api.url)
        told = done.stderr.decode()
        assert done.returncode == 1
        assert told.startswith("internvl chat: ")
        assert told.count("\n") == 1
        assert "\x1b" not in told
        assert "\u202e" not in told


def test_a_server_of_its_own_shows_the_demo_model_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(encode(draw("yellow", "triangle")))
    with Terminal(["chat", str(picture)], tmp_path) as terminal:
        terminal.expect("internvl-demo; /help")
        terminal.expect("> ")
        terminal.type("What is this?\n")
        terminal.expect("yellow")
        terminal.expect("> ")
        terminal.interrupt("leaves")  # and the server does not end of it
        terminal.expect("> ")
        terminal.type("/regenerate\n")
        terminal.expect("tokens in")
        assert terminal.leave() == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("words", "question", "says"),
    [
        (["/nowhere/cat.png"], "What?", "/nowhere/cat.png is no file"),
        (["/dev/zero"], "What?", "/dev/zero is no file"),
        ([], "", "nothing was asked"),
        (["--url", "ftp://x"], "What?", "is no address"),
    ],
)
def test_what_cannot_be_asked_says_why_in_a_line(
    words: list[str], question: str, says: str
) -> None:
    done = pipe(*words, question=question)
    assert done.returncode == 2
    assert says in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""
