"""Whatever a client writes into a data: URL, it gets its own bytes or a refusal."""

import asyncio
import base64

from hypothesis import given
from hypothesis import strategies as st

from preprocessing.sources import Fetcher
from wire.errors import MediaRefused
from wire.settings import MediaSettings

HEAD = "data:image/png;base64,"
FETCHER = Fetcher(MediaSettings(max_media_bytes=300))
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


def fetch(url: str) -> bytes | MediaRefused:
    try:
        return asyncio.run(FETCHER.fetch(url, "part"))
    except MediaRefused as refused:
        return refused


@given(st.binary(min_size=1, max_size=300))
def test_bytes_come_back(body: bytes) -> None:
    assert fetch(HEAD + base64.b64encode(body).decode()) == body


@given(st.binary(min_size=301, max_size=400))
def test_bytes_over_the_cap_are_refused(body: bytes) -> None:
    answer = fetch(HEAD + base64.b64encode(body).decode())
    assert isinstance(answer, MediaRefused)
    assert answer.code == "media_too_large"


@given(st.one_of(st.text(BASE64 + "\n -_%", max_size=60), st.text(max_size=40)))
def test_only_what_decodes_and_encodes_to_itself_is_accepted(text: str) -> None:
    body = fetch(HEAD + text)
    if isinstance(body, MediaRefused):
        assert (body.param, body.code) == ("part", "invalid_media")
        return
    again = base64.b64encode(body).decode()
    # The bits behind the last whole byte are the only freedom base64 leaves.
    assert len(again) == len(text)
    assert again.rstrip("=")[:-1] == text.rstrip("=")[:-1]


@given(st.text(max_size=60))
def test_any_text_after_the_scheme_is_an_answer_or_a_refusal(text: str) -> None:
    answer = fetch("data:" + text)
    assert answer
    if isinstance(answer, MediaRefused):
        assert answer.code in {"invalid_media", "media_too_large"}
