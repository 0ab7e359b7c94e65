"""The worker that tries grammars, with grammars made to break it."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.grammars import TOO_LONG, GrammarChecker
from server.tokenizer import Tokenizer
from tests.small_tokenizer import reference, tokenizer_json
from wire.errors import Unavailable
from wire.sampling import Grammar

TOKENS = Tokenizer(json.loads(tokenizer_json()))
SIZE = reference().get_vocab_size()
GOOD = Grammar("json_object")


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker()
    yield made
    await made.close()


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def definitions(count: int, link: str) -> dict[str, object]:
    """A chain of references; ``link`` holds what stands between two of them."""
    chain = {f"d{i}": json.loads(link.replace("NEXT", f"#/$defs/d{i + 1}")) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "string"}}}


HARMLESS = {
    "a long repetition": Grammar("regex", "a{1,100000}"),
    "nested repetitions": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "what stops other matchers": Grammar("regex", "(.*a){40}|(x+x+)+y|(a|b)*a(a|b){20}"),
    "many choices": Grammar("choice", json.dumps([f"choice {i}" for i in range(1000)])),
    "a large enum": schema({"enum": [f"value {i * i}" for i in range(3000)]}),
    "a schema within itself": schema({"properties": {"a": {"$ref": "#"}}, "type": "object"}),
    "a billion items": schema({"type": "array", "minItems": 1_000_000_000}),
    "a chain of references": schema(definitions(1000, '{"$ref": "NEXT"}')),
    "doubling references": schema(
        definitions(60, '{"allOf": [{"$ref": "NEXT"}, {"$ref": "NEXT"}]}')
    ),
    "rules that double": Grammar(
        "lark",
        "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"',
    ),
}
REFUSED = {
    "look-ahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "look-ahead in a schema": (schema({"type": "string", "pattern": "^(?=.*A).*$"}), "look-around"),
    "a back reference": (Grammar("regex", r"(a)\1"), "backreferences"),
    "parentheses": (Grammar("regex", "(" * 30000 + ")" * 30000), "250"),
    "parentheses in Lark": (Grammar("lark", "start: " + "(" * 30000), "too deeply nested"),
    "a reference elsewhere": (schema({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch"),
    "a reference to a file": (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "nothing but itself": (schema({"$ref": "#"}), "nothing matches it"),
    "nothing at all": (Grammar("regex", r"[^\s\S]"), "nothing matches it"),
    "terminals that double": (
        Grammar(
            "lark",
            "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "a"',
        ),
        "too big",
    ),
    "an unknown token": (
        Grammar("lark", "start: <nonsense>"),
        'unknown special token: "<nons',
    ),
    "no rule": (Grammar("lark", 'begin: "a"'), "no start rule"),
    "broken Lark": (Grammar("lark", 'start: "a"\nother: ('), "line 2: "),
}
KILLED = {
    "many multiples": schema({"type": "integer", "multipleOf": 999_983}),
    "many patterns": schema(
        {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(100)]}
    ),
}


@pytest.mark.parametrize("grammar", HARMLESS.values(), ids=HARMLESS.keys())
async def test_some_grammars_only_look_hostile(checker: GrammarChecker, grammar: Grammar) -> None:
    assert await checker.problem(grammar, TOKENS, SIZE) is None


@pytest.mark.parametrize(("grammar", "reason"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_cannot_be_compiled_is_refused_with_a_reason(
    checker: GrammarChecker, grammar: Grammar, reason: str
) -> None:
    problem = await checker.problem(grammar, TOKENS, SIZE)
    assert problem is not None
    assert problem.startswith("cannot be compiled: ")
    assert reason in problem
    assert "\n" not in problem
    assert len(problem) < 250


@pytest.mark.parametrize("grammar", KILLED.values(), ids=KILLED.keys())
async def test_what_takes_too_long_ends_the_worker_and_the_next_one_goes_on(
    checker: GrammarChecker, grammar: Grammar
) -> None:
    assert await checker.problem(grammar, TOKENS, SIZE) == TOO_LONG
    assert await checker.problem(GOOD, TOKENS, SIZE) is None


async def test_a_worker_that_dies_is_replaced(checker: GrammarChecker) -> None:
    assert await checker.problem(GOOD, TOKENS, SIZE) is None
    assert checker._worker is not None
    checker._worker.process.send_signal(signal.SIGSEGV)
    await checker._worker.process.wait()
    assert await checker.problem(Grammar("regex", "a"), TOKENS, SIZE) == "cannot be compiled"
    assert await checker.problem(Grammar("regex", "a"), TOKENS, SIZE) is None


async def test_whoever_leaves_costs_the_next_neither_its_answer_nor_the_worker(
    checker: GrammarChecker,
) -> None:
    assert await checker.problem(GOOD, TOKENS, SIZE) is None
    worker = checker._worker
    asking = asyncio.ensure_future(checker.problem(Grammar("regex", "(?=a)"), TOKENS, SIZE))
    waiting = asyncio.ensure_future(checker.problem(Grammar("regex", "(?=c)"), TOKENS, SIZE))
    await asyncio.sleep(0)  # the first one has its turn
    asking.cancel()
    waiting.cancel()
    assert await checker.problem(Grammar("regex", "b"), TOKENS, SIZE) is None
    assert asking.cancelled()
    assert waiting.cancelled()
    assert checker._worker is worker


async def test_a_tenant_with_many_slow_grammars_does_not_hold_up_another(
    checker: GrammarChecker,
) -> None:
    slow = [schema({"type": "integer", "multipleOf": 999_983 + 2 * i}) for i in range(8)]
    theirs = [asyncio.ensure_future(checker.problem(one, TOKENS, SIZE, b"a")) for one in slow]
    await asyncio.sleep(0)  # they wait already
    assert await checker.problem(GOOD, TOKENS, SIZE, b"b") is None
    assert sum(one.done() for one in theirs) <= 2
    assert await asyncio.gather(*theirs) == [TOO_LONG] * len(slow)


async def test_nobody_waits_for_ever(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = asyncio.ensure_future(checker.problem(KILLED["many patterns"], TOKENS, SIZE))
    await asyncio.sleep(0)  # it has its turn
    monkeypatch.setattr("server.grammars.QUEUE_TIMEOUT", 0)
    with pytest.raises(Unavailable, match="waiting to be compiled"):
        await checker.problem(GOOD, TOKENS, SIZE)
    assert await slow == TOO_LONG


async def test_the_worker_runs_this_code_and_knows_no_keys(
    checker: GrammarChecker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("INTERNVL_API_KEY", "secret")
    assert await checker.problem(GOOD, TOKENS, SIZE) is None
    assert checker._worker is not None
    environment = Path(f"/proc/{checker._worker.process.pid}/environ").read_bytes()
    assert b"secret" not in environment


async def test_what_was_found_good_is_not_asked_again(checker: GrammarChecker) -> None:
    assert await checker.problem(GOOD, TOKENS, SIZE) is None
    slow = asyncio.ensure_future(checker.problem(KILLED["many patterns"], TOKENS, SIZE))
    assert await checker.problem(GOOD, TOKENS, SIZE) is None
    assert not slow.done()
    assert await slow == TOO_LONG


async def test_another_model_gets_a_worker_of_its_own(checker: GrammarChecker) -> None:
    named = Grammar("lark", "start: <tool_call>")
    assert await checker.problem(named, TOKENS, SIZE) is None
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<tool_call>"]
    problem = await checker.problem(named, Tokenizer(spec), SIZE)
    assert problem is not None
    assert "unknown special token" in problem


async def test_many_ask_at_once_and_each_gets_its_own_answer(checker: GrammarChecker) -> None:
    asked = [Grammar("regex", "a" * i if i % 2 else "(?=a)" * i) for i in range(1, 20)]
    found = await asyncio.gather(*(checker.problem(one, TOKENS, SIZE) for one in asked))
    assert [problem is None for problem in found] == [i % 2 == 1 for i in range(1, 20)]


async def test_what_the_worker_prints_is_shown_to_nobody_unless_it_is_to_be_found(
    checker: GrammarChecker, caplog: pytest.LogCaptureFixture
) -> None:
    async def printed() -> str:
        assert await checker.problem(GOOD, TOKENS, SIZE, b"") is None
        assert checker._worker is not None
        where = os.readlink(f"/proc/{checker._worker.process.pid}/fd/2")
        await checker.close()
        return where

    assert await printed() == os.devnull
    caplog.set_level(logging.DEBUG, "server.grammars")
    checker._good.clear()
    assert await printed() != os.devnull
