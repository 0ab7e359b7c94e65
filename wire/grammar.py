"""What a ``Grammar`` means to llguidance: the Lark text it stands for and the limits it is compiled
under. One home for both processes: what the front end accepted is what the engine compiles.

A grammar is compiled piece by piece while it is used. The limits bound the mask of one step and
the memory of one sequence. What compiling may cost is bounded by ``server.grammars``, in whose
worker it is tried first, because no limit of the library holds for every schema. Nothing is ever
fetched.
"""

import json
import re
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from wire.sampling import Grammar

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_items_in_row=5_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,  # else compiling costs more for a larger vocabulary
    verbose_errors=False,
)
# Without it the mask allows a special token where a grammar wants its name spelled out, and the
# matcher then refuses it. It stands behind the client's text: that keeps its line numbers, and the
# last one counts.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_WORDS = 200


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at its beginning; ask ``complaint`` whether the grammar could be compiled."""
    return LLMatcher(
        tokenizer, LLMatcher.grammar_from_lark(lark(grammar)), log_level=0, limits=LIMITS
    )


def complaint(matcher: LLMatcher) -> str | None:
    """Why the matcher cannot go on, in one line; None if it can."""
    if not matcher.is_error():
        return None
    text: str = matcher.get_error()
    if text.startswith("NoExtension"):
        return "nothing matches it"
    # A regex parser draws its finding below the pattern, and says what it is in the last line.
    found = re.search(r"^error: (.+)$", text, re.MULTILINE)
    line = found[1] if found else text.strip().partition("\n")[0]
    line = re.sub(r"^(at )?(\d+)\(\d+\): ", r"line \2: ", line)
    for prefix in ("line 1: ", "failed to compile JSON schema: ", "Parser Error: "):
        line = line.removeprefix(prefix)
    for tail in ("; following special tokens", ":  ("):  # a list of names, a dump of an expression
        line = line.partition(tail)[0]
    return line if len(line) <= _WORDS else line[:_WORDS] + "…"


def lark(grammar: Grammar) -> str:
    """The Lark text of a grammar."""
    if grammar.kind == "lark":
        return _as_lark(grammar.text) + _OPTIONS
    return f"start: {rule(grammar)}" + _OPTIONS


def rule(grammar: Grammar) -> str:
    """The right-hand side of the Lark rule of a grammar that is not Lark itself."""
    match grammar.kind:
        case "json_object":
            return json_rule({"type": "object"})
        case "json_schema":
            return json_rule(msgspec.json.decode(grammar.text), strict=grammar.strict)
        case "regex":
            return "/" + regex_to_lark(grammar.text, use_ascii="d") + "/"
        case "choice":
            return " | ".join(quote(text) for text in msgspec.json.decode(grammar.text))
        case "lark":
            raise ValueError("this is a bug: a grammar of several rules")


def _as_lark(text: str) -> str:
    """``text``, translated if it is in the notation of llama.cpp, which vLLM's clients use."""
    if is_lark_syntax(text):
        return text
    try:
        return str(gbnf_to_lark(text))
    except Exception:  # of several kinds; what the compiler then says of the text is clearer
        return text


def json_rule(schema: dict[str, Any], *, strict: bool = True) -> str:
    """The right-hand side of a Lark rule: values of a JSON schema, with one blank behind commas and
    colons and none elsewhere, as ``json.dumps`` writes them.

    Unless ``strict``, keywords that cannot be enforced are ignored and ``oneOf`` means ``anyOf``.
    """
    options = {
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": False,
        "whitespace_pattern": None,
        "coerce_one_of": not strict,
        "lenient": not strict,
    }
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def quote(text: str) -> str:
    """A Lark string that matches exactly ``text``."""
    # The one control character that JSON leaves as it is and Lark does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
