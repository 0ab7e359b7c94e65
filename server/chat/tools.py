"""Tool calls in the Hermes form that Qwen2.5-based models use: how tools, calls and results stand
in a prompt, and how calls are found in what the model writes."""

import dataclasses
import json
import uuid
from collections.abc import Sequence
from typing import Any

from server.chat.stops import longest_beginning

CALL = "<tool_call>"
CALL_END = "</tool_call>"


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


def render_result(content: str) -> str:
    """A tool's result in a user turn."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One complete call; ``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class ToolParser:
    """Split what the model writes into text and calls.

    Text that may be the beginning of a call is held back, with the blank before it. A call is
    handed out when it is complete; what is no well-formed call stays text.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._called = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What is certain after ``text``, in order."""
        self._held += text
        pieces: list[str | ToolCall] = []
        while True:
            if not self._inside:
                before, tag, after = self._held.partition(CALL)
                if not tag:
                    pieces.append(self._release())
                    break
                pieces.append(before.rstrip())
                self._held, self._inside = tag + after, True
            call, tag, after = self._held.partition(CALL_END)
            if not tag:
                break
            pieces.append(self._call(call.removeprefix(CALL), call + tag))
            self._held, self._inside = after, False
        return [piece for piece in pieces if piece]

    def flush(self, *, complete: bool = True) -> list[str | ToolCall]:
        """What was held back; ``complete`` is False if the model was cut off."""
        text, self._held = self._held, ""
        if self._inside:
            self._inside = False
            # Some models end their turn instead of closing the last tag.
            piece = self._call(text.removeprefix(CALL), text) if complete else text
        else:
            piece = "" if self._called and text.isspace() else text
        return [piece] if piece else []

    def _release(self) -> str:
        certain = self._held[: len(self._held) - longest_beginning(self._held, (CALL,))].rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def _call(self, body: str, raw: str) -> str | ToolCall:
        call = _parse(body)
        self._called = self._called or call is not None
        return call or raw


def _parse(body: str) -> ToolCall | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if isinstance(name, str) and name and isinstance(arguments, dict):
        return ToolCall("call_" + uuid.uuid4().hex[:24], name, _dump(arguments))
    return None
