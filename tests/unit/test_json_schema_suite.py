"""The published JSON Schema Test Suite against the grammars that schemas become."""

import json
from pathlib import Path

import pytest
from llguidance import LLTokenizer

from tests.small_tokenizer import tokenizer_json
from wire.grammar import compile_grammar
from wire.sampling import Grammar

SUITE = sorted((Path(__file__).parents[1] / "json_schema_suite").glob("*.json"))

# A grammar fixes the spelling, which JSON does not: these have another one for a valid value
# (1.0 for 1, keys in an order of their own), or leave open what "format" applies to.
RESPELLED = {
    "allOf": 2,
    "const": 5,
    "enum": 4,
    "format": 10,
    "type": 1,
}
REFUSED = {
    "additionalProperties": 2,
    "allOf": 2,
    "anyOf": 1,
    "format": 9,
    "maxItems": 1,
    "maxLength": 1,
    "minItems": 1,
    "minLength": 1,
    "multipleOf": 1,
    "not": 9,
    "oneOf": 9,
    "patternProperties": 3,
    "ref": 6,
    "uniqueItems": 6,
}


@pytest.mark.parametrize("file", SUITE, ids=lambda file: file.stem)
def test_nothing_invalid_can_be_written_and_what_cannot_be_enforced_is_refused(file: Path) -> None:
    tokenizer = LLTokenizer(tokenizer_json())
    refused = 0
    respelled: list[str] = []
    for group in json.loads(file.read_text(encoding="utf-8")):
        if isinstance(group["schema"], bool):
            continue
        grammar = compile_grammar(tokenizer, Grammar("json_schema", json.dumps(group["schema"])))
        if grammar.is_error():
            refused += 1
            continue
        for case in group["tests"]:
            matcher = grammar.deep_copy()
            written = tokenizer.tokenize_str(json.dumps(case["data"], ensure_ascii=False))
            accepted = matcher.consume_tokens(written) and matcher.is_accepting()
            name = f"{group['description']}: {case['description']}"
            assert case["valid"] or not accepted, name
            if case["valid"] and not accepted:
                respelled.append(name)
    assert refused == REFUSED.get(file.stem, 0)
    assert len(respelled) == RESPELLED.get(file.stem, 0), respelled
