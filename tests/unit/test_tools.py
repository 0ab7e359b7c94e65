"""Calls in what the model writes, however it arrives."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.tools import CALL, CALL_END, ToolCall, ToolParser


def call(name: str = "look", **arguments: object) -> str:
    return f"{CALL}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CALL_END}"


def parse(pieces: list[str], *, complete: bool = True) -> list[str | tuple[str, str]]:
    """What comes out, neighbouring texts joined, calls without their ids."""
    parser = ToolParser()
    found: list[str | tuple[str, str]] = []
    parts = [part for piece in pieces for part in parser.push(piece)]
    for part in parts + parser.flush(complete=complete):
        if isinstance(part, ToolCall):
            found.append((part.name, part.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


LOOK = ("look", '{"at": "ä"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, no call.", ["Hello, no call."]),
        (call(at="ä"), [LOOK]),
        (f"First.\n{call(at='ä')}\n{call('go')}\n", ["First.", LOOK, ("go", "{}")]),
        (f"{call(at='ä')}\nDone.", [LOOK, "\nDone."]),
        (call(at="ä").removesuffix(CALL_END), [LOOK]),
        (f"{CALL}{{'name': 1}}{CALL_END} ok", [f"{CALL}{{'name': 1}}{CALL_END} ok"]),
        (f'{CALL}{{"name": "x", "arguments": [1]}}{CALL_END}', None),
        (f"{CALL}{CALL_END}", None),
        (f"{CALL}{'[' * 5_000}{CALL_END}", None),
        ("a < b <tool", ["a < b <tool"]),
        ("ends with blanks  \n", ["ends with blanks  \n"]),
    ],
)
def test_calls_are_found_and_everything_else_stays_text(
    text: str, expected: list[str | tuple[str, str]] | None
) -> None:
    expected = [text] if expected is None else expected
    assert parse([text]) == expected
    assert parse(list(text)) == expected


@given(
    st.lists(
        st.sampled_from(["a ", " \n", "<", CALL, CALL_END, call(), "{}", "<tool"]), max_size=8
    ),
    st.lists(st.integers(1, 9)),
)
def test_the_sizes_of_the_pieces_make_no_difference(parts: list[str], sizes: list[int]) -> None:
    text = "".join(parts)
    pieces = []
    rest = text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parse([*pieces, rest]) == parse([text])


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = ToolParser()
    assert parser.push("Hello <to") == ["Hello"]
    assert parser.push("morrow") == [" <tomorrow"]


def test_a_call_that_was_cut_off_stays_text() -> None:
    text = CALL + '\n{"name": "look", "arguments": {}}'
    assert parse([text], complete=False) == [text]


def test_every_call_has_an_id_of_its_own() -> None:
    first, second = (
        part for part in ToolParser().push(call() + call()) if isinstance(part, ToolCall)
    )
    assert first.id != second.id
