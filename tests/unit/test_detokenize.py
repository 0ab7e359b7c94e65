"""Text from tokens, however they arrive."""

import json

from hypothesis import given
from hypothesis import strategies as st

from server.chat.detokenize import Detokenizer
from server.tokenizer import Tokenizer
from tests.small_tokenizer import encode_rendered, reference, tokenizer_json
from tests.unit.test_tokenizer import sentencepiece_like

TOKENIZER = Tokenizer(json.loads(tokenizer_json()))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def pieces_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces = []
    for size in sizes:
        pieces.append(ids[:size])
        ids = ids[size:]
    return [*pieces, ids]


@given(TEXTS, st.lists(st.integers(1, 4)))
def test_the_pieces_are_the_text_and_no_character_is_ever_split(
    text: str, sizes: list[int]
) -> None:
    ids = TOKENIZER.encode(text)
    stream = Detokenizer(TOKENIZER)
    shown = [stream.push(piece) for piece in pieces_of(ids, sizes)]
    assert stream.flush() == ""
    assert "".join(shown) == reference().decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.integers(0, reference().get_vocab_size() - 1), max_size=20))
def test_any_ids_give_what_the_reference_gives_for_all_of_them(ids: list[int]) -> None:
    for skip in (True, False):
        stream = Detokenizer(TOKENIZER, skip_special_tokens=skip)
        text = "".join(stream.push([id]) for id in ids) + stream.flush()
        assert text == reference().decode(ids, skip_special_tokens=skip)


def test_half_a_character_is_held_back_and_shown_as_lost_only_at_the_end() -> None:
    first, *rest = TOKENIZER.encode("🙂")
    assert rest
    stream = Detokenizer(TOKENIZER)
    assert stream.push([first]) == ""
    assert stream.push(rest) == "🙂"
    assert stream.push([first]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_skipped_and_tool_tags_are_not() -> None:
    ids = encode_rendered("<ref>a</ref><tool_call>")
    assert Detokenizer(TOKENIZER).push(ids) == "a<tool_call>"
    kept = Detokenizer(TOKENIZER, skip_special_tokens=False)
    assert kept.push(ids) == "<ref>a</ref><tool_call>"


def test_the_blank_before_the_first_word_goes_where_the_tokenizer_says_so() -> None:
    source = sentencepiece_like()
    ids = source.encode(" a b", add_special_tokens=False).ids
    stream = Detokenizer(Tokenizer(json.loads(source.to_str())))
    assert "".join(stream.push([id]) for id in ids) == source.decode(ids) == "a b"
