"""Boxes read from tokens, and the grammar that holds an answer to them."""

import copy
import json
import random

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from server.chat.grounding import MARKS, BoxReader, boxes_grammar
from server.schemas.answer import Box
from server.schemas.generation import MAX_BOXES, MAX_LABEL_LENGTH, MAX_LABELS
from server.tokenizer import Tokenizer
from tests.small_tokenizer import encode_rendered, tokenizer_json
from tests.unit.test_grammar import END, NAMES, SIZE, TOKENS, allowed, begin, viable
from wire.sampling import Grammar

A, B = "<ref>a</ref>", "<ref>b</ref>"


def read(text: str, **options: object) -> list[Box]:
    return BoxReader(TOKENS, **options).push(encode_rendered(text))  # type: ignore[arg-type]


FOUND: list[tuple[str, list[tuple[str | None, list[float]]]]] = [
    ("A red circle.", []),
    (A + "<box>[[1, 2, 3, 4]]</box>", [("a", [1, 2, 3, 4])]),
    (f"{A}<box>[[1,2,3,4],[5,6,7,8]]</box>", [("a", [1, 2, 3, 4]), ("a", [5, 6, 7, 8])]),
    (
        f"Look: {A}<box>[[1, 2, 3, 4]]</box> and {B}<box>[[5, 6, 7, 8]]</box>.",
        [("a", [1, 2, 3, 4]), ("b", [5, 6, 7, 8])],
    ),
    ("<box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    ("<box>[1, 2, 3, 4]</box>", [(None, [1, 2, 3, 4])]),
    (A + " is at <box> [ [ 1 , 2\n, 3, 4 ] ] </box>", [("a", [1, 2, 3, 4])]),
    # A label is for the list behind it, and for no other.
    (
        A + "<box>[[1, 2, 3, 4]]</box><box>[[5, 6, 7, 8]]</box>",
        [("a", [1, 2, 3, 4]), (None, [5, 6, 7, 8])],
    ),
    (A + "<box>[[1, 2, 3, 4]]<box>[[5, 6, 7, 8]]", [("a", [1, 2, 3, 4]), (None, [5, 6, 7, 8])]),
    (f"{A}{B}<box>[[1, 2, 3, 4]]</box>", [("b", [1, 2, 3, 4])]),
    ("<ref> red\ncircle é </ref><box>[[1, 2, 3, 4]]</box>", [("red\ncircle é", [1, 2, 3, 4])]),
    ("<ref> </ref><box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    # Numbers are as they were written.
    ("<box>[[-5, 2.5, 1200, 0.0]]</box>", [(None, [-5, 2.5, 1200, 0.0])]),
    ("<box>[[900, 800, 7, 6]]</box>", [(None, [900, 800, 7, 6])]),
    # What is no box is left out, and what is one beside it stays.
    (
        A + "<box>[[1, 2, 3], [1, 2, 3, 4, 5], [], [1, x, 3, 4], [5, 6, 7, 8]]</box>",
        [("a", [5, 6, 7, 8])],
    ),
    ("<box>[[1, 2, 3, 4e9], [1, 2, 3, nan], [1 2 3 4], [1, 2, 3, 4,]]</box>", []),
    ("<box>[[1234567, 2, 3, 4], [1, 2, 3, .5], [1, 2, 3, ٤]]</box>", []),
    ("<box>[[[1, 2, 3, 4]]]</box>", [(None, [1, 2, 3, 4])]),
    ("<box>1, 2, 3, 4</box><box></box><box>]</box>", []),
    ("<box>[[1," + " " * 200 + "2, 3, 4]]</box>", []),
    ("<box>" + "x" * 200 + "[1, 2, 3, 4]</box>", []),
    # Marks that are not closed, closed twice, or in each other.
    ("<box>[[1, 2, 3, 4], [5, 6", [(None, [1, 2, 3, 4])]),
    ("<box>[[1, 2, 3, 4]] and [5, 6, 7, 8]", [(None, [1, 2, 3, 4])]),
    ("<ref>a<box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    (A + "<box>[[1, 2<box>[[5, 6, 7, 8]]</box>", [(None, [5, 6, 7, 8])]),
    (A + "<box>[[1, 2" + B + ", 3, 4]]<box>[[5, 6, 7, 8]]</box>", [("b", [5, 6, 7, 8])]),
    ("</box></ref><ref><ref>a</ref></box><box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    ("<ref>" + "a" * 2000 + "</ref><box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    ("<box>x</ref><box>[[1, 2, 3, 4]]</box>", [(None, [1, 2, 3, 4])]),
    ("[[1, 2, 3, 4]]</box>", []),
    ("<quad>[[1, 2, 3, 4]]</quad>", []),
]


@pytest.mark.parametrize(("text", "found"), FOUND, ids=[text[:40] for text, _ in FOUND])
def test_well_formed_boxes_are_found_and_nothing_else(
    text: str, found: list[tuple[str | None, list[float]]]
) -> None:
    boxes = read(text)
    assert [(box.label, box.box) for box in boxes] == found
    assert [box.index for box in boxes] == list(range(len(found)))
    assert all(box.box_px is box.image_index is None for box in boxes)


def test_whole_numbers_stay_whole() -> None:
    (box,) = read("<box>[[40, 2.5, -1, 0.0]]</box>")
    assert json.dumps(box.box) == "[40, 2.5, -1, 0.0]"


def test_a_mark_that_is_only_spelled_is_text() -> None:
    assert BoxReader(TOKENS).push(TOKENS.encode("<ref>a</ref><box>[[1, 2, 3, 4]]</box>")) == []


def test_a_box_is_there_with_the_bracket_that_closes_it() -> None:
    reader = BoxReader(TOKENS)
    for token in encode_rendered("<ref>a</ref><box>[[1, 2, 3, 4"):
        assert reader.push([token]) == []
    assert len(reader.push(TOKENS.encode("]"))) == 1


@pytest.mark.parametrize(
    ("numbers", "size", "pixels"),
    [
        ("0, 0, 1000, 1000", (640, 480), [0, 0, 640, 480]),
        ("250, 500, 750, 1000", (640, 480), [160, 240, 480, 480]),
        ("1, 1, 999, 999", (4000, 100), [4, 0, 3996, 100]),  # to the nearest edge of a pixel
        ("750, 1000, 250, 500", (640, 480), [160, 240, 480, 480]),  # in order
        ("-20, 500, 1200, 999999", (640, 480), [0, 240, 640, 480]),  # inside of the picture
        ("12.5, 0, 62.5, 99.75", (80, 400), [1, 0, 5, 40]),
    ],
)
def test_pixels_are_those_of_the_picture(
    numbers: str, size: tuple[int, int], pixels: list[int]
) -> None:
    (box,) = read(f"<box>[[{numbers}]]</box>", sizes=[size])
    assert (box.box_px, box.image_index) == (pixels, 0)


ONE, TWO = [(100, 100)], [(100, 100), (10, 20)]


@pytest.mark.parametrize(
    ("before", "options", "index"),
    [
        ("", {"sizes": ONE}, 0),
        ("Image-2: ", {"sizes": ONE, "named": True}, 0),
        ("", {"sizes": TWO, "named": True}, None),
        ("Image-2: ", {"sizes": TWO}, None),  # nobody has named them so
        ("Image-2: ", {"sizes": TWO, "named": True}, 1),
        ("Image-2: <ref>x</ref> and Image-1", {"sizes": TWO, "named": True}, 0),
        ("<ref>circle in Image-2</ref>", {"sizes": TWO, "named": True}, 1),
        ("Image-2: <box>[[Image-1]]</box>", {"sizes": TWO, "named": True}, 1),
        ("Image-2 or Image-3: ", {"sizes": TWO, "named": True}, None),
        ("Image-0", {"sizes": TWO, "named": True}, None),
        ("Image-12", {"sizes": TWO, "named": True}, None),
        ("Image-" + "1" * 5000, {"sizes": TWO, "named": True}, None),
        ("Image-<ref>1</ref>", {"sizes": TWO, "named": True}, None),
        ("Image-1", {"sizes": TWO, "named": True, "about": 1}, 1),
        ("", {"sizes": TWO, "about": 1}, 1),
        ("", {"sizes": TWO[:1], "alone": False}, None),
        ("", {"sizes": TWO[:1], "alone": False, "about": 0}, 0),
    ],
)
def test_the_picture_is_known_or_left_open(
    before: str, options: dict[str, object], index: int | None
) -> None:
    *_, box = read(before + "<box>[[0, 0, 500, 500]]</box>", **options)
    assert box.image_index == index
    assert box.box_px == {None: None, 0: [0, 0, 50, 50], 1: [0, 0, 5, 10]}[index]


WORDS = ("[", "]", "[[", "]]", ", ", "1", "12, 3", "-", ".", " ", "Image-1", "é", "<img>")
LISTS = ("[[1, 2, 3, 4]]", "[5, 6, 7, 8]", "<ref>a</ref><box>[[9, 9, 9, 9]]</box>")


@given(st.lists(st.sampled_from([*MARKS, *WORDS, *LISTS]), max_size=40), st.integers(0, 200))
def test_any_tokens_give_the_same_boxes_together_one_by_one_and_from_a_copy(
    pieces: list[str], cut: int
) -> None:
    tokens = encode_rendered("".join(pieces))
    sizes, together = [(7, 3), (640, 480)], []
    reader = BoxReader(TOKENS, sizes, named=True)
    whole = reader.push(tokens)
    reader = BoxReader(TOKENS, sizes, named=True)
    for token in tokens[:cut]:
        together += reader.push([token])
    other = copy.copy(reader)
    reader.push(encode_rendered("<box>[[1, 2, 3, 4]]</box>"))
    assert together + other.push(tokens[cut:]) == whole
    for box in whole:
        assert len(box.box) == 4
        assert box.label != ""
        if box.box_px is not None and box.image_index is not None:
            x1, y1, x2, y2 = box.box_px
            width, height = sizes[box.image_index]
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height


@pytest.mark.parametrize("text", ["<ref>a", "<box>[[1, ", "<box>x", "Image-1", "[", "<box>[1, 2, "])
def test_a_reader_keeps_little_of_what_never_ends(text: str) -> None:
    first, *rest = encode_rendered(text)
    reader = BoxReader(TOKENS, [(1, 1)] * 2, named=True)
    reader.push([first])
    for _ in range(3000):
        reader.push(rest or [first])
    assert sum(len(v) for v in vars(reader).values() if isinstance(v, str | bytes)) < 2048


def test_thousands_of_boxes_are_read() -> None:
    text = "<box>[" + ", ".join(["[1, 2, 3, 4]"] * 5000) + "]</box>"
    assert [box.index for box in read(text)] == list(range(5000))


def test_what_an_answer_continues_is_not_reported_but_remembered() -> None:
    reader = BoxReader(TOKENS)
    reader.skip(encode_rendered("<ref>a</ref><box>[[1, 2, 3, 4], [5, 6"))
    assert reader.push(TOKENS.encode(", 7, 8]]")) == [Box(0, "a", [5, 6, 7, 8], None, None)]


# Tokens of the marks, as characters that no text has, so that a regular expression can name them.
PLACES = dict(zip(MARKS, "\ue000\ue001\ue002\ue003", strict=True))
NUMBER = "(?:0|[1-9][0-9]{0,2}|1000)"
FOUR = rf"\[{NUMBER}(?:, {NUMBER}){{3}}\]"
BORDER, INNER = r"[^\x00-\x20\x7f<>\ue000-\ue003]", r"[^\x00-\x1f\x7f<>\ue000-\ue003]"
ANY_LABEL = f"{BORDER}(?:{INNER}{{0,{MAX_LABEL_LENGTH - 2}}}{BORDER})?"


def language(label: str, item: str) -> str:
    """``item``, in which @ stands for a label and 4 for four numbers."""
    return item.replace("@", f"\ue000(?:{label})\ue001").replace("4", FOUR)


ANY = "(?:@\ue002\\[4(?:, 4)*\\]\ue003)+"
ONLY_ONE = "@\ue002\\[4\\]\ue003"
UP_TO_TWO = f"{ONLY_ONE}(?:{ONLY_ONE})?|@\ue002\\[4, 4\\]\ue003"


def characters(token: int) -> bytes:
    return PLACES.get(TOKENS.added.get(token, ""), "").encode() or TOKENS.token_bytes(token)


@pytest.mark.parametrize(
    ("labels", "most", "expected"),
    [
        (None, None, language(ANY_LABEL, ANY)),
        (None, 1, language(ANY_LABEL, ONLY_ONE)),
        (["a", "a b", "<ref>"], 2, language("a|a b|<ref>", UP_TO_TWO)),
        (['"\n\\'], MAX_BOXES, language(r'"\n\\', ANY)),
    ],
)
def test_the_grammar_allows_what_can_become_boxes_and_nothing_else(
    labels: list[str] | None, most: int | None, expected: str
) -> None:
    text = boxes_grammar(TOKENS, labels, most)
    assert text is not None
    pattern = regex.compile(expected)
    source = random.Random(0)
    others = {token for token in NAMES if TOKENS.added[token] not in MARKS}
    ended = 0
    for _ in range(8):
        matcher, output = begin(Grammar("lark", text)), []
        while len(output) < 60:
            found = allowed(matcher, output)
            spelled = b"".join(map(characters, output))
            fits = {
                token
                for token in set(range(SIZE)) - others
                if (data := characters(token)) and viable(pattern, spelled + data)
            }
            assert found - {END} == fits, spelled
            assert (END in found) == (
                pattern.fullmatch(spelled.decode(errors="replace")) is not None
            )
            ended += END in found
            marks = sorted(found & set(NAMES) - {END})
            if found <= {END} or (END in found and source.random() < 0.5):
                break
            # Else a walk would stay in its first label.
            output.append(
                source.choice(marks if marks and source.random() < 0.7 else sorted(found - {END}))
            )
        boxes = BoxReader(TOKENS).push(output)
        if END in found:
            assert boxes
            assert len(boxes) <= (most or len(boxes))
            assert labels is None or {box.label for box in boxes} <= {
                label.strip() for label in labels
            }
    assert ended


def test_the_largest_grammar_compiles() -> None:
    labels = [
        '"' + chr(0x7F) * (MAX_LABEL_LENGTH - 4) + str(number) for number in range(MAX_LABELS)
    ]
    text = boxes_grammar(TOKENS, labels, MAX_BOXES)
    assert text is not None
    grammar = Grammar("lark", text)
    assert grammar.problem() is None
    assert begin(grammar).error is None


def test_without_tokens_for_the_marks_there_is_no_grammar_and_no_box() -> None:
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "</box>"]
    tokenizer = Tokenizer(spec)
    assert boxes_grammar(tokenizer) is None
    tokens = encode_rendered("<ref>a</ref><box>[[1, 2, 3, 4]]")
    assert len(BoxReader(TOKENS).push(tokens)) == 1
    spec["added_tokens"] = []
    assert BoxReader(Tokenizer(spec)).push(tokens) == []
