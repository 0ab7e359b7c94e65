"""Stop strings, however the text arrives."""

from hypothesis import example, given
from hypothesis import strategies as st

from server.chat.stops import StopMatcher

WORDS = st.text("ab\n", min_size=1, max_size=4)


def before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Look at every beginning of the text, as a model would write it."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(st.text("abc\n", max_size=6), max_size=8), st.lists(WORDS, min_size=1, max_size=3))
@example(["ab", "c"], ["abc", "b"])
@example(["a", "ab"], ["aab"])
def test_the_text_before_the_first_complete_stop_is_shown_and_nothing_else(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        # Nothing that was shown may have to be taken back.
        assert before_stop("".join(pieces), stops)[0].startswith(shown)
    shown += matcher.flush()
    assert (shown, matcher.stopped) == before_stop("".join(pieces), stops)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello\n") == "Hello"
    assert matcher.push("you\n\nUs") == "\nyou"
    assert matcher.push("e") == ""
    assert matcher.push("d.") == "\n\nUsed."
    assert not matcher.stopped


def test_without_stops_everything_passes_at_once() -> None:
    assert StopMatcher(()).push("anything") == "anything"


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["x"])
    assert matcher.push("axb") == "a"
    assert matcher.push("c") == matcher.flush() == ""
