"""Stop strings, also across the borders of what arrives. Text that may be the beginning of one is
held back until that is clear; a stop string itself is shown only if that is asked for."""

from collections.abc import Sequence


class StopMatcher:
    """Cut a text before the first stop string, or behind it if it is to be shown. ``found`` is the
    one that was met.

    The stop string that is complete first wins, so that the answer does not depend on the sizes
    of the pieces in which the text arrives.
    """

    def __init__(self, stops: Sequence[str], *, show: bool = False) -> None:
        self._stops = tuple(stops)
        self._show = show
        self._held = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether one was met."""
        return self.found is not None

    def push(self, text: str) -> str:
        """The text that is certainly before any stop string."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, start = min(found)
            self.found = text[start:end]
            return text[: end if self._show else start]
        keep = longest_beginning(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        text, self._held = self._held, ""
        return text


def longest_beginning(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning of a word, but not all of it."""
    longest = max(map(len, words), default=1) - 1
    for at in range(max(0, len(text) - longest), len(text)):
        end = text[at:]
        for word in words:
            if len(word) > len(end) and word.startswith(end):
                return len(end)
    return 0
