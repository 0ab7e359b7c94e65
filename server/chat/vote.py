"""Final answers of texts, in a form in which equal ones are equal: by these candidates vote."""

import json
import re

import msgspec

_SAID = re.compile(r"\b(?:final answer|the answer is)\b(?: is)?[\s:*]*([^\n]*)", re.IGNORECASE)
_OPEN, _CLOSE = "<answer>", "</answer>"
_BOX = "\\boxed{"
_UNIT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_NUMBER = re.compile(r"([-+]?)(?=\.?\d)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?", re.ASCII)
_CHOICE = re.compile(r"[(\[](\w+)[)\]]")
_AROUND = " $*`\"',;:"


def final_answer(text: str, *, whole: bool) -> str | None:
    """What a text says in the end, None if nothing: the last ``<answer>…</answer>``, or else the
    last ``\\boxed{…}``, or else the rest of the line behind the last "final answer" or "the answer
    is", or else the last line, which only a ``whole`` text has, that is not cut off. A text that is
    JSON is its own answer.

    Equal are answers that differ in case, blanks, the marks around them, and zeros of a number.
    """
    text = text.strip()
    if text[:1] in ("{", "[") and (value := _json(text)) is not None:
        return value
    said = _SAID.findall(text)
    if (tagged := _tagged(text)) is not None:
        found = tagged
    elif (boxed := _boxed(text)) is not None:
        found = boxed
    elif said:
        found = said[-1]
    else:
        found = text.rpartition("\n")[2] if whole else ""
    return _normal(found) or None


def _json(text: str) -> str | None:
    try:
        return json.dumps(msgspec.json.decode(text), sort_keys=True, ensure_ascii=False)
    except (msgspec.DecodeError, RecursionError):
        return None


def _tagged(text: str) -> str | None:
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(end, 0))
    return text[start + len(_OPEN) : end] if start >= 0 else None


def _boxed(text: str) -> str | None:
    """What the last box holds that is closed behind its own braces."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    start += len(_BOX)
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start:at]
    return None


def _normal(found: str) -> str:
    found = _boxed(found) or found
    found = _UNIT.sub(r"\1", found)
    # A point before a number is one of its own.
    found = " ".join(found.split()).rstrip(_AROUND + ".").lstrip(_AROUND).casefold()
    if (choice := _CHOICE.fullmatch(found)) is not None:
        found = choice[1]
    if (number := _NUMBER.fullmatch(found)) is not None:
        sign, whole, part = number.groups("")
        whole, part = whole.replace(",", "").lstrip("0") or "0", part.rstrip("0")
        found = f"{whole}.{part}" if part else whole
        if sign == "-" and found != "0":
            found = "-" + found
    return found
