"""What answers vote for."""

import time

import pytest

from server.chat.critic import steps_of
from server.chat.vote import final_answer

SAME = [
    ("42", ["42.", " 42\n", "$42$", "**42**", "42.0", "+42", "\\boxed{42}", "<answer>42</answer>"]),
    (
        "42",
        ["Final answer: 42", "FINAL ANSWER:\n\n42", "So the answer is 42.", "It is \\boxed{42}!"],
    ),
    ("1234567.5", ["1,234,567.50", "1234567.5"]),
    ("0", ["0.00", "-0", "0", "-.0"]),
    ("0.5", [".5", "$.50", "0.5.", "+00.5"]),
    ("-0.5", ["-.5", "**-0.50**"]),
    # No digit is lost: these are two.
    ("12345678901234567890123456789012345", ["12345678901234567890123456789012345"]),
    ("12345678901234567890123456789012346", ["12,345,678,901,234,567,890,123,456,789,012,346.0"]),
    ("a", ["(A)", "[a]", "A.", "**(A)**", "\\boxed{\\text{A}}", "The final answer is: (a)"]),
    ("\\frac{1}{2}", ["\\boxed{\\frac{1}{2}}", "$\\frac{1}{2}$", "Answer:\n\\frac{1}{2}"]),
    ("f(x)", ["f(x)", "<answer> F(x) </answer>"]),
    ("red circle", ["I see it.\nRed  circle", '"red circle"']),
    ('{"a": [1, 2]}', ['{"a":[1,2]}', ' {"a": [1, 2]}\n']),
    # What says it most plainly counts, and of that what comes last.
    ("2", ["\\boxed{1} no, \\boxed{2}", "<answer>1</answer> <answer>2</answer> \\boxed{3}\n4"]),
    ("2", ["The answer is 1.\nNo, the final answer is 2.\nGood."]),
]


@pytest.mark.parametrize(
    ("answer", "text"), [(answer, text) for answer, texts in SAME for text in texts]
)
def test_it_is_found_and_made_equal(answer: str, text: str) -> None:
    assert final_answer(text, whole=True) == answer


@pytest.mark.parametrize("text", ["", " \n ", "...", "**.**", "\\boxed{}", "<answer> </answer>"])
def test_nothing_is_no_answer(text: str) -> None:
    assert final_answer(text, whole=True) is None


def test_the_last_line_of_a_text_that_was_cut_off_is_none() -> None:
    assert final_answer("I think\nit is 4", whole=False) is None
    assert final_answer("\\boxed{4} as I", whole=False) == "4"
    assert final_answer("so \\boxed{4", whole=False) is None


@pytest.mark.parametrize(
    "piece", ["<answer>", "</answer>", "\\boxed{", "the answer is", "\n", "((", "{", "[", "9", "1,"]
)
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (400_000 // len(piece))
    began = time.process_time()
    final_answer(text, whole=True)
    assert time.process_time() - began < 2


def test_steps_are_divided_by_blank_lines_and_joined_where_they_are_too_many() -> None:
    assert steps_of("\n\none\ntwo\n\n\n\nthree\n\n", 12) == ["one\ntwo", "three"]
    assert steps_of("", 12) == [""]
    seven = "\n\n".join("abcdefg")
    assert steps_of(seven, 7) == list("abcdefg")
    assert steps_of(seven, 3) == ["a\n\nb\n\nc", "d\n\ne\n\nf", "g"]
    assert steps_of(seven, 1) == [seven]
