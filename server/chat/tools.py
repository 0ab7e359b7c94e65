"""Tool calls in the Hermes form that Qwen2.5-based models use: how tools, calls and results stand
in a prompt, the grammar of an answer that must call, and how calls are found in what the model
writes."""

import dataclasses
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from server.chat.stops import longest_beginning
from server.tokenizer import Tokenizer
from wire.grammar import json_rule, quote

CALL = "<tool_call>"
CALL_END = "</tool_call>"
RESULT = ("<tool_response>\n", "\n</tool_response>")
"""What stands around a tool's result in a user turn."""


def describe(tools: Sequence[dict[str, Any]]) -> str:
    """The block that offers ``tools`` at the end of the system turn."""
    lines = "".join("\n" + _dump(tool) for tool in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        f"{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        f"{CALL}{CALL_END} XML tags:\n{CALL}\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n' + CALL_END
    )


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """An earlier call in an assistant turn."""
    return f'{CALL}\n{{"name": {_dump(name)}, "arguments": {_dump(arguments)}}}\n{CALL_END}'


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


class Function(Protocol):
    """What a grammar must know of a function; ``parameters`` is a JSON schema."""

    @property
    def name(self) -> str:
        """How it is called."""

    @property
    def parameters(self) -> dict[str, Any] | None:
        """None if it takes none."""

    @property
    def strict(self) -> bool | None:
        """Whether a schema that cannot be enforced whole is refused."""


def call_grammar(
    functions: Sequence[Function], tokenizer: Tokenizer, *, many: bool, answer: str | None = None
) -> str:
    """The Lark grammar of one call of one of ``functions`` (or, with ``many``, of several), each
    written as ``render_call`` does; or, where that rule is given, of an ``answer`` instead. The
    tags are tokens where the checkpoint has them."""
    rules = [arguments_rule(function) for function in functions]
    lines = ['start: call ("\\n" call)*' if many else "start: call"]
    if answer is not None:
        lines = [f"{lines[0]} | answer", f"answer: {answer}"]
    return "\n".join([*lines, *_calls(functions, rules, tokenizer)])


def free_grammar(functions: Sequence[Function], tokenizer: Tokenizer) -> str | None:
    """The Lark grammar of any text with calls in it, which holds the arguments of strict functions
    to their schemas. None if no function is strict, or the checkpoint has no tokens for the tags:
    then nothing tells a call from text before it is there."""
    tags = {_tag(tag, tokenizer) for tag in (CALL, CALL_END)}
    if not any(function.strict for function in functions) or quote(CALL) in tags:
        return None
    rules = [
        arguments_rule(function) if function.strict else json_rule({"type": "object"})
        for function in functions
    ]
    others = [token for token, name in tokenizer.added.items() if name != CALL]
    return "\n".join(
        [
            "start: TEXT? ((call | other) TEXT?)*",
            f"other: <[{','.join(map(str, others))}]>",
            # Spelled out, the tag would begin a call to whoever reads the text.
            f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{CALL}(.|\\n)*/",
            *_calls(functions, rules, tokenizer),
        ]
    )


def _calls(
    functions: Sequence[Function], rules: Sequence[str], tokenizer: Tokenizer
) -> Iterator[str]:
    opening, closing = (_tag(tag, tokenizer) for tag in (CALL, CALL_END))
    yield "call: " + " | ".join(f"call_{number}" for number in range(len(functions)))
    for number, (function, rule) in enumerate(zip(functions, rules, strict=True)):
        head = quote(f'\n{{"name": {_dump(function.name)}, "arguments": ')
        tail = quote("}\n")
        yield f"call_{number}: {opening} {head} arguments_{number} {tail} {closing}"
        yield f"arguments_{number}: {rule}"


_NAMING = frozenset({"$schema", "type", "title", "description", "properties", "required"})


def arguments_rule(function: Function) -> str:
    """The right-hand side of the rule for a function's arguments, which are always an object."""
    schema = function.parameters
    # As OpenAI has it, a function without parameters takes none; some clients name none instead.
    if schema is None or (schema.get("properties") == {} and schema.keys() <= _NAMING):
        schema = {"properties": {}, "additionalProperties": False}
    return json_rule({**schema, "type": "object"}, strict=bool(function.strict))


def _tag(tag: str, tokenizer: Tokenizer) -> str:
    token = tokenizer.token_id(tag)
    # A special token would be left out of the text, where calls are looked for.
    plain = token is None or token in tokenizer.special_ids
    return quote(tag) if plain else f"<[{token}]>"


@dataclasses.dataclass(frozen=True)
class CallStart:
    """A call whose name is known; what follows of it belongs to its arguments."""

    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """More of the text of the last call's arguments, as the model wrote it."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallEnd:
    """The last call is over."""


Piece = str | CallStart | CallArguments | CallEnd

# How a call begins if it is written as models are taught: then its arguments can be passed on as
# they come. Bounded, so that looking for it at every piece costs nothing to speak of.
_BEGINNING = re.compile(
    r'\s{0,32}\{\s{0,32}"name"\s{0,32}:\s{0,32}"([^"\\<\x00-\x1f]{1,256})"\s{0,32},'
    r'\s{0,32}"arguments"\s{0,32}:\s{0,32}(?=\{)'
)
_TAG = re.compile(f"{CALL}|{CALL_END}")


class ToolParser:
    """Split what the model writes into text and calls; the outcome does not depend on how the text
    was cut into pieces.

    Text that may be the beginning of a call is held back, with the blank before it. A call that
    begins as usual is handed out from its name on, piece by piece, and stays one even if it breaks
    off. Any other is held until its end, and stays text if it is no well-formed call.
    """

    def __init__(self) -> None:
        self._held = ""
        self._read = self._read_text
        self._arguments = _Arguments()
        self._called = False

    def push(self, text: str) -> list[Piece]:
        """What is certain after ``text``, in order."""
        self._held += text
        pieces: list[Piece] = []
        while self._read(pieces):
            pass
        return pieces

    def flush(self, *, complete: bool = True) -> list[Piece]:
        """What was held back; ``complete`` is False if the model was cut off."""
        text, self._held = self._held, ""
        read, self._read = self._read, self._read_text
        if read == self._read_arguments:
            return [CallEnd()]
        if read == self._read_rest or (self._called and text.isspace()):
            return []
        if read == self._read_call and complete:
            # Some models end their turn instead of closing the last tag.
            return self._call(text.removeprefix(CALL)) or [text]
        return [text] if text else []

    # Each reads from what is held and says whether there may be more to read: in another state.

    def _read_text(self, pieces: list[Piece]) -> bool:
        at = self._held.find(CALL)
        end = at if at >= 0 else len(self._held) - longest_beginning(self._held, (CALL,))
        certain = self._held[:end].rstrip()
        if certain:
            pieces.append(certain)
        self._held = self._held[at if at >= 0 else len(certain) :]
        if at >= 0:
            self._read = self._read_call
        return at >= 0

    def _read_call(self, pieces: list[Piece]) -> bool:
        begins = _BEGINNING.match(self._held, len(CALL))
        if begins:
            pieces.append(self._start(begins[1]))
            self._held = self._held[begins.end() :]
            self._arguments = _Arguments()
            self._read = self._read_arguments
            return True
        call, tag, after = self._held.partition(CALL_END)
        if not tag:
            return False
        pieces += self._call(call.removeprefix(CALL)) or [call + tag]
        self._held, self._read = after, self._read_text
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        count = self._arguments.take(self._held)
        if count:
            pieces.append(CallArguments(self._held[:count]))
        self._held = self._held[count:]
        if not self._arguments.over:
            return False
        pieces.append(CallEnd())
        self._read = self._read_rest
        return True

    def _read_rest(self, pieces: list[Piece]) -> bool:
        """Between a call's arguments and the tag that closes it, or that opens the next one."""
        found = _TAG.search(self._held)
        if found is None:
            self._held = self._held[-len(CALL_END) :]
            return False
        self._held = self._held[found.end() if found[0] == CALL_END else found.start() :]
        self._read = self._read_text
        return True

    def _start(self, name: str) -> CallStart:
        self._called = True
        return CallStart("call_" + uuid.uuid4().hex[:24], name)

    def _call(self, body: str) -> list[Piece]:
        """The pieces of a whole call; none if it is not well-formed."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        name, arguments = value.get("name"), value.get("arguments", {})
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            return []
        return [self._start(name), CallArguments(_dump(arguments)), CallEnd()]


class _Arguments:
    """Finds the end of a JSON object by its braces, as it arrives."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.over = False

    def take(self, text: str) -> int:
        """How many more characters belong to it. A "<" outside of a string ends it too: there it
        cannot be JSON, and is where a tag begins."""
        for index, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.over = True
                    return index + 1
            elif character == "<":
                self.over = True
                return index
        return len(text)
