"""Calls in what the model writes, however it arrives, and the grammar of demanded calls."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLTokenizer

from server.chat.tools import (
    CALL,
    CALL_END,
    CallArguments,
    CallEnd,
    CallStart,
    ToolParser,
    call_grammar,
    free_grammar,
    render_call,
)
from server.schemas.chat import FunctionDefinition
from server.tokenizer import Tokenizer
from tests.small_tokenizer import reference, tokenizer_json
from wire.grammar import compile_grammar, complaint, json_rule
from wire.sampling import Grammar


def call(name: str = "look", **arguments: object) -> str:
    return f"{CALL}\n{json.dumps({'name': name, 'arguments': arguments})}\n{CALL_END}"


def parse(pieces: list[str], *, complete: bool = True) -> list[str | tuple[str, str]]:
    """What comes out, neighbouring pieces joined, calls without their ids."""
    parser = ToolParser()
    found: list[str | tuple[str, str]] = []
    open_call = False
    parts = [part for piece in pieces for part in parser.push(piece)]
    for part in parts + parser.flush(complete=complete):
        if isinstance(part, CallStart):
            assert not open_call
            open_call = True
            found.append((part.name, ""))
        elif isinstance(part, CallArguments):
            assert open_call
            name, arguments = found.pop()
            found.append((name, arguments + part.text))
        elif isinstance(part, CallEnd):
            assert open_call
            open_call = False
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    assert not open_call
    return found


LOOK = ("look", '{"at": "\\u00e4"}')
BEGINNING = f'{CALL}\n{{"name": "look", "arguments": '


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, no call.", ["Hello, no call."]),
        (call(at="ä"), [LOOK]),
        (f"First.\n{call(at='ä')}\n{call('go')}\n", ["First.", LOOK, ("go", "{}")]),
        (f"{call(at='ä')}\nDone.", [LOOK, "\nDone."]),
        (call(at="ä").removesuffix(CALL_END), [LOOK]),
        (call(at=f'{CALL_END} \\ " {{'), [("look", json.dumps({"at": f'{CALL_END} \\ " {{'}))]),
        # as models are not taught to write it: held until the end
        (f'{CALL}{{"arguments": {{"a":1}}, "name": "x"}}{CALL_END}', [("x", '{"a": 1}')]),
        (f'{CALL}{{"name": "x"}}{CALL_END}!', [("x", "{}"), "!"]),
        (f'{CALL}{{"name": "\\u0078", "arguments": {{}}}}{CALL_END}', [("x", "{}")]),
        (f'{CALL}{{"arguments": {{}}, "name": "x"}}', [("x", "{}")]),
        # no calls
        (f"{CALL}{{'name': 1}}{CALL_END} ok", [f"{CALL}{{'name': 1}}{CALL_END} ok"]),
        (f'{CALL}{{"name": "x", "arguments": [1]}}{CALL_END}', None),
        (f'{CALL}{{"name": "", "arguments": {{}}}}{CALL_END}', None),
        (f"{CALL}{CALL_END}", None),
        (f"{CALL}{'[' * 5_000}{CALL_END}", None),
        ("a < b <tool", ["a < b <tool"]),
        ("ends with blanks  \n", ["ends with blanks  \n"]),
        # calls that break off when their name has been told
        (BEGINNING + '{"at": [1', [("look", '{"at": [1')]),
        (BEGINNING + f'{{"at": 1 {CALL_END} So', [("look", '{"at": 1 '), " So"]),
        (BEGINNING + f'{{"at": 1}}, "id": 3}}\n{CALL_END} So', [("look", '{"at": 1}'), " So"]),
        (BEGINNING + "{}\n" + call("go"), [("look", "{}"), ("go", "{}")]),
    ],
)
def test_calls_are_found_and_everything_else_stays_text(
    text: str, expected: list[str | tuple[str, str]] | None
) -> None:
    expected = [text] if expected is None else expected
    assert parse([text]) == expected
    assert parse(list(text)) == expected


PARTS = st.sampled_from(
    [
        *("a ", " \n", "<", CALL, CALL_END, call(), call(at=f"x{CALL}\\"), "{}", "<tool", '"', "}"),
        *(BEGINNING, BEGINNING + '{"a": ', '{"name": "x", "arguments": {', "\\", '"b": [{'),
        *(f'{CALL}{{"arguments": {{}}, "name": "late"}}{CALL_END}', '{"name": "', "</tool_call"),
    ]
)


@given(st.lists(PARTS, max_size=8), st.lists(st.integers(1, 9)), st.booleans())
def test_the_sizes_of_the_pieces_make_no_difference(
    parts: list[str], sizes: list[int], complete: bool
) -> None:
    text = "".join(parts)
    pieces = []
    rest = text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parse([*pieces, rest], complete=complete) == parse([text], complete=complete)


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = ToolParser()
    assert parser.push("Hello <to") == ["Hello"]
    assert parser.push("morrow") == [" <tomorrow"]


def test_a_name_is_told_at_once_and_arguments_as_they_come() -> None:
    parser = ToolParser()
    assert parser.push(BEGINNING) == []
    start, *more = parser.push('{"at')
    assert isinstance(start, CallStart)
    assert (start.name, more) == ("look", [CallArguments('{"at')])
    assert parser.push('": "}"') == [CallArguments('": "}"')]
    assert parser.push("}}") == [CallArguments("}"), CallEnd()]
    assert parser.push(f"\n{CALL_END}") == []
    assert parser.flush() == []


def test_what_was_cut_off_is_text_before_its_name_is_certain_and_a_call_after() -> None:
    assert parse([BEGINNING], complete=False) == [BEGINNING]
    assert parse([BEGINNING + "{"], complete=False) == [("look", "{")]
    whole = BEGINNING + "{}}"
    assert parse([whole], complete=False) == [("look", "{}")]
    late = f'{CALL}{{"arguments": {{}}, "name": "x"}}'
    assert parse([late], complete=False) == [late]


def test_every_call_has_an_id_of_its_own() -> None:
    first, second = (p for p in ToolParser().push(call() + call()) if isinstance(p, CallStart))
    assert first.id != second.id


TOKENS = Tokenizer(json.loads(tokenizer_json()))
WEATHER = FunctionDefinition(
    name="get weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
NOTHING = FunctionDefinition(name='say "<hi>"')
LOOSE = FunctionDefinition(name="loose", parameters={"properties": {"n": {"type": "integer"}}})


@pytest.mark.parametrize(
    ("text", "many", "whole"),
    [
        (render_call("get weather", {"city": "Paris"}), False, True),
        (render_call("get weather", {"city": f"ä {CALL_END}", "days": 3}), False, True),
        (render_call('say "<hi>"', {}), True, True),
        (render_call("loose", {"n": 1, "other": [None]}), True, True),
        ("\n".join([render_call('say "<hi>"', {}), render_call("loose", {})]), True, True),
        ("\n".join([render_call('say "<hi>"', {}), render_call("loose", {})]), False, False),
        (render_call("get weather", {}), False, False),
        (render_call("get weather", {"city": 1}), False, False),
        (render_call('say "<hi>"', {"a": 1}), False, False),
        (render_call("get_weather", {"city": "Paris"}), False, False),
        (render_call("loose", {"n": "1"}), False, False),
        (f'{CALL}\n{{"name": "loose", "arguments": [1]}}\n{CALL_END}', False, False),
        ("Paris", True, False),
        ("", True, False),
    ],
)
def test_a_demanded_call_is_written_as_models_are_taught_and_keeps_to_its_schema(
    text: str, many: bool, whole: bool
) -> None:
    tokenizer = LLTokenizer(tokenizer_json())
    grammar = call_grammar([WEATHER, NOTHING, LOOSE], TOKENS, many=many)
    matcher = compile_grammar(tokenizer, Grammar("lark", grammar))
    assert complaint(matcher) is None
    ids: list[int] = []
    for line in text.split("\n"):  # tags are tokens of their own, other names are not
        ids += TOKENS.encode("\n") if ids else []
        tag = line in (CALL, CALL_END)
        ids += [reference().token_to_id(line)] if tag else TOKENS.encode(line)
    assert (matcher.consume_tokens(ids) and matcher.is_accepting()) == whole
    if whole:
        names = [name for name, _ in parse(list(text))]
        assert set(names) <= {"get weather", 'say "<hi>"', "loose"}


@pytest.mark.parametrize("parameters", [None, {"type": "object", "properties": {}, "title": "x"}])
@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (render_call("nothing", {}), True),
        (render_call("nothing", {"a": 1}), False),
        ('{"a": 1}', True),
        ('{"a": "1"}', False),
        ("", False),
    ],
)
def test_a_call_of_a_function_that_takes_nothing_or_an_answer(
    parameters: dict[str, Any] | None, text: str, whole: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    function = FunctionDefinition(name="nothing", parameters=parameters)
    grammar = call_grammar([function], TOKENS, many=True, answer=json_rule(schema))
    matcher = compile_grammar(LLTokenizer(tokenizer_json()), Grammar("lark", grammar))
    assert complaint(matcher) is None
    assert (matcher.consume_tokens(ids_of(text)) and matcher.is_accepting()) == whole


STRICT = WEATHER.model_copy(update={"strict": True})


def ids_of(text: str, *, tags: bool = True) -> list[int]:
    """``text`` in tokens; tags and special tokens as such, or all spelled out."""
    return list(reference().encode(text).ids) if tags else TOKENS.encode(text)


@pytest.mark.parametrize(
    ("text", "tags", "whole"),
    [
        ("", True, True),
        ('Hello, <b> "you" ä\n', True, True),
        ("see <ref>dog</ref><box>[[1]]</box>", True, True),
        (f"I look.\n{render_call('get weather', {'city': 'Paris'})}\nSo!", True, True),
        ("\n".join(render_call("get weather", {"city": c}) for c in "ab"), True, True),
        (render_call("loose", {"n": "as it likes"}), True, True),
        (render_call("get weather", {}), True, False),
        (render_call("get weather", {"city": 1}), True, False),
        (render_call("unknown", {}), True, False),
        (render_call("get weather", {}), False, False),
        ("a <tool_call", False, True),
    ],
)
def test_strict_tools_hold_calls_to_their_schemas_and_leave_the_text_alone(
    text: str, tags: bool, whole: bool
) -> None:
    grammar = free_grammar([STRICT, LOOSE], TOKENS)
    assert grammar is not None
    matcher = compile_grammar(LLTokenizer(tokenizer_json()), Grammar("lark", grammar))
    assert complaint(matcher) is None
    accepted = matcher.consume_tokens(ids_of(text, tags=tags)) and matcher.is_accepting()
    assert accepted == whole


def test_without_strict_tools_or_tokens_for_the_tags_text_is_free() -> None:
    assert free_grammar([WEATHER, LOOSE], TOKENS) is None
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != CALL]
    assert free_grammar([STRICT], Tokenizer(spec)) is None


def test_tags_are_spelled_where_the_checkpoint_has_no_token_for_them() -> None:
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in (CALL, CALL_END)]
    tokens = Tokenizer(spec)
    matcher = compile_grammar(
        LLTokenizer(json.dumps(spec)), Grammar("lark", call_grammar([NOTHING], tokens, many=False))
    )
    assert matcher.consume_tokens(tokens.encode(render_call('say "<hi>"', {})))
    assert matcher.is_accepting()
