"""Masks against an independent oracle: partial matches of the ``regex`` package, token by token."""

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import regex
import torch
from llguidance import LLTokenizer

from engine.grammar import Grammars, Matcher, masks
from engine.sampling.base import SampleRow
from engine.sampling.sampler import NOTHING_LEFT, sample
from server.tokenizer import Tokenizer
from tests.small_tokenizer import reference, tokenizer_json
from wire.errors import InvalidRequest
from wire.grammar import compile_grammar, complaint
from wire.sampling import (
    MAX_CHOICES,
    MAX_GRAMMAR_LENGTH,
    MAX_GRAMMAR_LINES,
    MAX_NESTING,
    Grammar,
    SamplingParams,
)

TOKENS = Tokenizer(json.loads(tokenizer_json()))
SIZE = reference().get_vocab_size()
END = reference().token_to_id("<|im_end|>")
CALL = reference().token_to_id("<tool_call>")
NAMES = [token for token in range(SIZE) if token in TOKENS.added]

# JSON knows more ways to escape; a grammar needs one for every character.
STRING = r'"(?:[^"\\\x00-\x1f\x7f]|\\(?:["\\bfnrt]|u00(?:[01][0-9a-fA-F]|7[fF])))*"'
INTEGER = r"-?(?:0|[1-9][0-9]*)"

# A grammar, and by hand the regular expression of its language. The first two letters of every
# choice, and names of tokens inside of text, are where spelling and meaning could part.
LANGUAGES: list[tuple[Grammar, str]] = [
    (Grammar("regex", r"[a-c]{2,3}-\d+"), r"[a-c]{2,3}-[0-9]+"),
    (Grammar("regex", r"(red|blue)? circle/"), r"(?:red|blue)? circle/"),
    (Grammar("regex", "a\nb|<ref>x"), "a\nb|<ref>x"),
    (
        Grammar("choice", '["yes", "yes!", "no", "a <ref> \\"b\\"\\n", ""]'),
        r'yes!?|no|a <ref> "b"\n|',
    ),
    (Grammar("choice", '["<tool_call>", "<tool"]'), "<tool_call>|<tool"),
    (Grammar("choice", '["a\x7f\\u0000\\t"]'), "a\x7f\0\t"),
    (Grammar("lark", 'start: a "." \na: "x" a | /[yz]/'), r"x*[yz]\."),
    (Grammar("json_schema", '{"type": "string"}'), STRING),
    (Grammar("json_schema", '{"type": "integer"}'), INTEGER),
    (
        Grammar("json_schema", '{"enum": ["a", 1, null, [true], {"k": "v"}]}'),
        r'"a"|1|null|\[true\]|\{"k": "v"\}',
    ),
    (
        Grammar(
            "json_schema",
            '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},'
            ' "required": ["b"], "additionalProperties": false}',
        ),
        rf'\{{(?:"a": {INTEGER}, )?"b": (?:true|false)\}}',
    ),
    (
        Grammar("json_schema", '{"type": "array", "items": {"enum": ["x"]}, "maxItems": 3}'),
        r'\[(?:"x"(?:, "x"){0,2})?\]',
    ),
    (
        Grammar("json_schema", '{"type": "string", "pattern": "^[A-Z][a-z]{1,3}$"}'),
        r'"[A-Z][a-z]{1,3}"',
    ),
]


def grammars() -> Grammars:
    return Grammars(LLTokenizer(tokenizer_json(), eos_token=END))


def params(grammar: Grammar, **values: object) -> SamplingParams:
    return SamplingParams(grammar=grammar, **{"stop_token_ids": (END,), "max_tokens": 99, **values})


def begin(grammar: Grammar, stops: tuple[int, ...] = (END,)) -> Matcher:
    matcher = grammars().matcher(params(grammar, stop_token_ids=stops))
    assert matcher is not None
    return matcher


def allowed(matcher: Matcher, output: list[int]) -> set[int]:
    matcher.advance(np.array(output, dtype=np.int64))
    bits = np.unpackbits(masks([matcher])[0].view(np.uint8), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


def spelled(output: list[int]) -> bytes:
    return b"".join(TOKENS.token_bytes(token) for token in output)


def viable(pattern: "regex.Pattern[str]", data: bytes) -> bool:
    """Whether some text of the language begins with ``data``."""
    try:
        return pattern.fullmatch(data.decode(), partial=True) is not None
    except UnicodeDecodeError as error:
        # The beginning of a character: some character of its kind must fit. The languages treat
        # all characters beyond ASCII alike.
        if error.reason != "unexpected end of data":
            return False
        known = data[: error.start].decode()
        return pattern.fullmatch(known + "é", partial=True) is not None


@pytest.mark.parametrize(("grammar", "language"), LANGUAGES, ids=lambda value: str(value)[:40])
def test_a_token_is_allowed_where_the_text_can_go_on_so_and_nowhere_else(
    grammar: Grammar, language: str
) -> None:
    pattern = regex.compile(language)
    source = random.Random(0)
    for _ in range(12):
        matcher, output = begin(grammar), []
        while len(output) < 25:
            found = allowed(matcher, output)
            text = spelled(output)
            expected = {
                token
                for token in range(SIZE)
                if token not in NAMES
                and (data := TOKENS.token_bytes(token))
                and viable(pattern, text + data)
            }
            assert found - {END} == expected, text
            complete = regex.fullmatch(language, text.decode(errors="replace")) is not None
            assert (END in found) == complete, text
            if found <= {END}:
                break
            output.append(source.choice(sorted(found - {END})))
    assert matcher.error is None


def test_only_stop_tokens_follow_a_complete_text_and_they_are_those_of_the_request() -> None:
    matcher = begin(Grammar("choice", '["yes"]'), stops=(CALL, 3))
    output = TOKENS.encode("yes")
    assert allowed(matcher, []) == {t for t in range(SIZE) if b"yes".startswith(spelled([t]))} - {
        token for token in range(SIZE) if not spelled([token])
    }
    assert allowed(matcher, output) == {CALL, 3}


def test_a_grammar_can_name_a_token() -> None:
    matcher = begin(Grammar("lark", f'start: <[{CALL}]> "x"'))
    assert allowed(matcher, []) == {CALL}
    assert spelled(sorted(allowed(matcher, [CALL]))) == b"x"


def test_a_matcher_that_starts_late_is_where_one_that_went_along_is() -> None:
    grammar = Grammar("json_schema", '{"type": "object"}')
    output = TOKENS.encode('{"name": "get_weather", "argum')
    along = begin(grammar)
    for length in range(len(output)):
        allowed(along, output[:length])
    assert allowed(along, output) == allowed(begin(grammar), output)


def test_many_masks_at_once_are_those_made_one_by_one() -> None:
    grammars = [grammar for grammar, _ in LANGUAGES] + [Grammar("regex", "(?=refused)")]
    together = masks([begin(grammar) for grammar in grammars])
    assert len(together) > 8
    for mask, grammar in zip(together, grammars, strict=True):
        np.testing.assert_array_equal(mask, masks([begin(grammar)])[0])


def test_a_token_that_does_not_fit_ends_in_an_error_and_an_empty_mask() -> None:
    matcher = begin(Grammar("choice", '["yes"]'))
    assert allowed(matcher, TOKENS.encode("no")) == set()
    assert matcher.error


def test_what_cannot_be_compiled_gives_a_matcher_with_an_error() -> None:
    matcher = begin(Grammar("regex", "(?=a)"))
    assert matcher.error == "look-around, including look-ahead and look-behind, is not supported"
    assert allowed(matcher, []) == set()


def rows(*grammar: Grammar | None, **values: object) -> list[SampleRow]:
    made, none = grammars(), np.zeros(0, dtype=np.int64)
    given = [params(g, **values) if g else SamplingParams(temperature=0.0) for g in grammar]
    return [SampleRow(p, none, none, made.matcher(p)) for p in given]


def flat(*rows: int, size: int = SIZE) -> torch.Tensor:
    """Logits that prefer later ids."""
    return torch.arange(size, dtype=torch.float32).expand(len(rows), -1).clone()


def test_rows_without_a_grammar_are_untouched_and_others_keep_to_theirs() -> None:
    yes, no = Grammar("choice", '["yes"]'), Grammar("choice", '["no"]')
    tokens = sample(flat(0, 1, 2), rows(yes, None, no, temperature=0.0)).tolist()
    assert b"yes".startswith(spelled(tokens[:1]))
    assert tokens[1] == SIZE - 1
    assert b"no".startswith(spelled(tokens[2:]))


@pytest.mark.parametrize("size", [SIZE, SIZE + 37, SIZE - 10])
def test_ids_that_the_tokenizer_does_not_know_are_never_drawn(size: int) -> None:
    anything = Grammar("regex", r"(.|\n)*")
    token = sample(flat(0, size=size), rows(anything, temperature=0.0)).item()
    assert token == max(t for t in range(min(size, SIZE)) if t == END or t not in NAMES)


@pytest.mark.parametrize(
    "values",
    [
        {"logit_bias": ((5, 100.0),)},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -2.0},
        {"temperature": 2.0},
    ],
)
def test_nothing_makes_a_forbidden_token_possible(values: dict[str, object]) -> None:
    (row,) = rows(Grammar("choice", '["yes"]'), **{"temperature": 0.0, **values})
    for seed in range(20):
        token = sample(flat(0) / 50, [row]).item()
        assert b"yes".startswith(spelled([token])), seed


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_token_ids": (5,)},
        {"bad_words": tuple((t,) for t in range(SIZE) if spelled([t]) in (b"y", b"ye", b"yes"))},
    ],
)
def test_where_nothing_is_left_that_row_alone_has_no_token(values: dict[str, object]) -> None:
    yes = Grammar("choice", '["yes"]')
    both = rows(yes, **values) + rows(None)
    assert sample(flat(0, 1), both).tolist() == [NOTHING_LEFT, SIZE - 1]


def problems() -> Iterator[tuple[Grammar, str]]:
    long = "x" * (MAX_GRAMMAR_LENGTH + 1)
    yield Grammar("regex", long), f"must not be longer than {MAX_GRAMMAR_LENGTH} characters"
    lines = "\n" * MAX_GRAMMAR_LINES
    yield Grammar("lark", lines), f"must not have more than {MAX_GRAMMAR_LINES} lines"
    deep = '{"items":' * MAX_NESTING + "{}" + "}" * MAX_NESTING
    yield Grammar("json_schema", deep), f"must not be nested deeper than {MAX_NESTING} levels"
    yield Grammar("json_schema", "{"), "must be JSON"
    yield Grammar("json_schema", "[" * 5000), "must be JSON"
    yield Grammar("json_schema", "[]"), "must be an object"
    yield Grammar("choice", '["a", 1]'), "must be an array of strings"
    for choices in ([], ["a"] * (MAX_CHOICES + 1)):
        yield Grammar("choice", json.dumps(choices)), f"must have 1 to {MAX_CHOICES} entries"


@pytest.mark.parametrize(("grammar", "problem"), list(problems()))
def test_what_is_too_large_or_malformed_is_refused_without_compiling_it(
    grammar: Grammar, problem: str
) -> None:
    assert grammar.problem() == problem
    with pytest.raises(InvalidRequest, match="grammar must"):
        params(grammar).check()


def test_a_grammar_needs_an_end() -> None:
    with pytest.raises(InvalidRequest, match="stop token"):
        params(Grammar("regex", "a"), stop_token_ids=()).check()


@pytest.mark.parametrize(
    ("schema", "strict", "reason"),
    [
        ('{"type": "array", "uniqueItems": true}', True, 'Unimplemented keys: ["uniqueItems"]'),
        ('{"type": "array", "uniqueItems": true}', False, None),
        ('{"$ref": "http://127.0.0.1:9/x"}', False, "Resource 'http://127.0.0.1:9/x' is not"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', True, "Unsatisfiable schema: minimum"),
        ('{"x-guidance": {"whitespace_flexible": true, "lenient": true}, "not": {}}', True, "Un"),
    ],
)
def test_a_strict_schema_is_enforced_whole_or_refused(
    schema: str, strict: bool, reason: str | None
) -> None:
    tokenizer = LLTokenizer(tokenizer_json())
    found = complaint(compile_grammar(tokenizer, Grammar("json_schema", schema, strict)))
    assert found is None if reason is None else found is not None and found.startswith(reason)
