"""How the terminal's page of `internvl chat` is cut into blocks, and what is attached to a turn."""

from pathlib import Path

import pytest

from server.shell.attachments import attachment
from server.shell.paper import split


@pytest.mark.parametrize(
    ("text", "over", "rest"),
    [
        ("one", "", "one"),
        ("one\n\n", "", "one\n\n"),  # what comes may belong to a list
        ("one\n\ntw", "one", "tw"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo", "three"),
        ("1. a\n\n   more", "", "1. a\n\n   more"),
        ("1. a\n\n   more\n\nend", "1. a\n\n   more", "end"),
        ("```\ncode\n\nmore", "", "```\ncode\n\nmore"),
        ("```\ncode\n\nmore\n```\n\nend", "```\ncode\n\nmore\n```", "end"),
        ("~~~\n```\n\na", "", "~~~\n```\n\na"),
    ],
)
def test_a_block_is_over_when_nothing_can_be_added(text: str, over: str, rest: str) -> None:
    assert split(text) == (over, rest)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("https://example.org/a.png", "image_url"),
        ("https://example.org/a.MP4?x=1", "video_url"),
        ("data:image/png;base64,AA==", "image_url"),
        ("data:video/mp4;base64,AA==", "video_url"),
    ],
)
def test_urls_are_sent_as_they_are(name: str, kind: str) -> None:
    assert attachment(name) == {"type": kind, kind: {"url": name}}


def test_files_are_sent_along(tmp_path: Path) -> None:
    for name, begin in (
        ("a.jpg", "data:image/jpeg;base64,aGk="),
        ("a", "data:image/png;base64,aGk="),
        ("a.mkv", "data:video/"),
    ):
        (tmp_path / name).write_bytes(b"hi")
        part = attachment(str(tmp_path / name))
        assert part[part["type"]]["url"].startswith(begin)
    assert attachment(str(tmp_path / "a"), "video")["type"] == "video_url"
