"""Two API keys at one server."""

from collections.abc import Iterator

import pytest

from tests.servers import Server, draw, part

TEXT = "What is in this picture? " * 8


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--api-key", "one,two", "--api-key-weights", "1,3", "--scheduling-policy", "fair"]
    flags += ["--open-metrics"]
    server = Server(tmp_path_factory.mktemp("server") / "log.txt", flags)
    yield server
    server.close()


def ask(server: Server, key: str) -> tuple[str | None, int]:
    """The answer, and how much of its prompt was found in the cache."""
    messages = [{"role": "user", "content": [part(draw("red", "circle")), part(TEXT)]}]
    with server.client(default_headers={"Authorization": f"Bearer {key}"}) as client:
        answer = client.chat.completions.create(
            model="internvl-demo",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=16,
        )
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].message.content, details.cached_tokens


def test_a_key_finds_what_it_has_sent_itself_and_nothing_of_another(shared: Server) -> None:
    text, cached = ask(shared, "one")
    assert cached == 0
    tiles = shared.metric("internvl_encoded_tiles_total")
    assert ask(shared, "one")[0] == text
    assert ask(shared, "one")[1] > 0
    assert shared.metric("internvl_encoded_tiles_total") == tiles
    assert ask(shared, "two") == (text, 0)
    assert shared.metric("internvl_encoded_tiles_total") == 2 * tiles
    assert ask(shared, "two")[1] > 0
