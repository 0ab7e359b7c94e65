"""Grammars over the demo model: what is written keeps to them, and it does not depend on how the
sequence was batched, cached, preempted or interrupted."""

import json
import re
from typing import Any

import jsonschema
import msgspec
import pytest

from demo import CHECKPOINT
from engine.core import EngineCore
from engine.runner import ModelRunner
from server.tokenizer import Tokenizer
from tests.parity.test_scheduled import run
from wire.messages import EngineRequest
from wire.sampling import Grammar, SamplingParams
from wire.settings import EngineSettings

TOKENS = Tokenizer.load(CHECKPOINT)
END = TOKENS.token_id("<|im_end|>")
LENGTH = 120

SHORT = {"type": "string", "maxLength": 8}
SCHEMAS = [
    {"type": "object", "properties": {"a": SHORT, "b": {"type": "integer"}}, "required": ["a"]},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1000}, "maxItems": 4},
    {"enum": ["red", "green", 3, None, {"deep": ["x", "<ref>"]}]},
    {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "$defs": {
        "n": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
              "additionalProperties": False}}, "additionalProperties": False},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": SHORT, "maxItems": 2}]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    {"type": "string", "format": "date"},
    {"type": "number", "minimum": -2, "exclusiveMaximum": 7, "multipleOf": 0.5},
    {"type": "array", "prefixItems": [SHORT, {"type": "null"}], "items": False, "minItems": 2},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"type": "object", "patternProperties": {"^k[0-9]$": SHORT}, "additionalProperties": False,
     "maxProperties": 3},
    {"type": "array", "items": {"type": "object", "properties": {"color": {"enum": ["red", "blue"]},
     "box": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9},
     "minItems": 4, "maxItems": 4}},
     "required": ["color", "box"], "additionalProperties": False}, "maxItems": 1},
]  # fmt: skip
OTHERS = [
    Grammar("json_object"),
    Grammar("regex", r"[a-z]{3}(-\d{2}){1,3}"),
    Grammar("choice", '["a red circle", "a red square", "<box>"]'),
    Grammar("lark", 'start: item (", " item)*\nitem: /[a-z]+/ "=" /[0-9]{1,3}/'),
]
GRAMMARS = [Grammar("json_schema", json.dumps(schema)) for schema in SCHEMAS] + OTHERS


def request(number: int, temperature: float, name: str = "") -> EngineRequest:
    prompt = TOKENS.encode("You are a helpful assistant. What is in this picture? " + "ab" * number)
    assert END is not None
    sampling = SamplingParams(
        temperature=temperature,
        seed=number,
        max_tokens=LENGTH,
        stop_token_ids=(END,),
        grammar=GRAMMARS[number],
    )
    return EngineRequest(f"{name}{number} {temperature}", prompt, sampling)


def requests(name: str = "") -> list[tuple[EngineRequest, list[bytes]]]:
    """Every grammar, greedy and drawn."""
    return [(request(i, heat, name), []) for i in range(len(GRAMMARS)) for heat in (0.0, 1.5)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    """Each request by itself."""
    tokens, _ = run(CHECKPOINT, [[one] for one in requests()], enable_prefix_caching=False)
    return tokens


def written(tokens: list[int]) -> str | None:
    """The whole text, if it was not cut off."""
    if tokens[-1] != END:
        assert len(tokens) == LENGTH
        return None
    return b"".join(TOKENS.token_bytes(token) for token in tokens[:-1]).decode()


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_a_schema_is_kept_by_every_answer(number: int) -> None:
    batch = [
        (msgspec.structs.replace(made, id=f"{seed}", sampling=drawn), [])
        for made in [request(number, 1.5)]
        for seed in range(12)
        for drawn in [msgspec.structs.replace(made.sampling, seed=seed)]
    ]
    tokens, _ = run(CHECKPOINT, [batch])
    texts = [text for one in tokens.values() if (text := written(one)) is not None]
    assert len(texts) >= 6
    for text in texts:
        jsonschema.validate(
            json.loads(text), SCHEMAS[number], format_checker=jsonschema.FormatChecker()
        )


def test_other_grammars_are_kept(alone: dict[str, list[int]]) -> None:
    start = len(SCHEMAS)
    texts = [[written(alone[f"{start + i} {heat}"]) for heat in (0.0, 1.5)] for i in range(4)]
    assert all(text is None or isinstance(json.loads(text), dict) for text in texts[0])
    assert all(re.fullmatch(r"[a-z]{3}(-[0-9]{2}){1,3}", str(text)) for text in texts[1])
    assert all(text in json.loads(OTHERS[2].text) for text in texts[2])
    rule = r"[a-z]+=[0-9]{1,3}"
    assert all(text is None or re.fullmatch(rf"{rule}(, {rule})*", text) for text in texts[3])


def test_together_is_alone(alone: dict[str, list[int]]) -> None:
    tokens, _ = run(CHECKPOINT, [requests()])
    assert tokens == alone


def test_cached_is_uncached(alone: dict[str, list[int]]) -> None:
    tokens, core = run(CHECKPOINT, [requests(), requests("again ")])
    assert {name: tokens[f"again {name}"] for name in alone} == alone
    assert core._scheduler.stats.cached_tokens > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 40, "block_size": 4},
        {"max_num_batched_tokens": 5, "max_num_seqs": 4},
        {"async_scheduling": "on"},
        {"async_scheduling": "on", "num_kv_blocks": 40, "block_size": 4},
    ],
    ids=str,
)
def test_cramped_is_alone(alone: dict[str, list[int]], settings: dict[str, Any]) -> None:
    tokens, core = run(CHECKPOINT, [requests()], **settings)
    assert tokens == alone
    if "num_kv_blocks" in settings:
        assert core._scheduler.stats.preemptions > 0


def test_restarted_is_not(alone: dict[str, list[int]]) -> None:
    """What an engine is asked when the one before it died in the middle of every answer."""
    halves = {name: tokens[: len(tokens) // 2] for name, tokens in alone.items()}
    resumed = [
        (msgspec.structs.replace(made, output=halves[made.id]), buffers)
        for made, buffers in requests()
    ]
    tokens, _ = run(CHECKPOINT, [resumed])
    assert {name: halves[name] + rest for name, rest in tokens.items()} == alone


def test_a_grammar_that_cannot_go_on_ends_its_row_alone(alone: dict[str, list[int]]) -> None:
    stuck = request(len(SCHEMAS) + 2, 0.0)
    sampling = msgspec.structs.replace(stuck.sampling, min_tokens=LENGTH)
    other = request(0, 0.0)
    options = EngineSettings(model=str(CHECKPOINT), device="cpu", threads=1, num_kv_blocks=128)
    runner = ModelRunner(options)
    core = EngineCore(options, runner, runner.ready())
    core.add(msgspec.structs.replace(stuck, id="stuck", sampling=sampling))
    core.add(other)
    outputs = []
    while (report := core.step()) is not None:
        outputs += report.outputs
    assert [o.finish_reason for o in outputs if o.id == "stuck"][-1] == "stuck"
    assert [t for o in outputs if o.id == other.id for t in o.token_ids] == alone[other.id]


def test_a_grammar_that_fails_says_why_and_its_prompt_stays_cached() -> None:
    options = EngineSettings(
        model=str(CHECKPOINT), device="cpu", threads=1, num_kv_blocks=128, block_size=4
    )
    runner = ModelRunner(options)
    core = EngineCore(options, runner, runner.ready())
    made = request(0, 0.0)
    broken = msgspec.structs.replace(made.sampling, grammar=Grammar("regex", "(?=a)"))
    core.add(msgspec.structs.replace(made, sampling=broken))
    outputs = []
    while (report := core.step()) is not None:
        outputs += report.outputs
    (output,) = outputs
    assert output.finish_reason == "error"
    assert "look-around" in str(output.error)
    core.add(made)
    while core.step() is not None:
        pass
    assert core._scheduler.stats.cached_tokens > 0
