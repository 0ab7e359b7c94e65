"""Text that others wrote, made safe for a terminal: what it could take for a command of its own is
shown instead. Titles, colours and cursor belong to this program, and the clipboard to the user."""

import re

# Control characters but newline and tab, and those that turn the direction of what is read.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """The same text with each of them as a character that is seen."""
    return _UNSAFE.sub(_seen, text)


def _seen(found: "re.Match[str]") -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"
