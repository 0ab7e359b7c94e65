"""Two API keys at one server."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.servers import Server, draw, encode, part

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


def test_a_key_neither_sees_nor_ends_the_files_of_another(shared: Server) -> None:
    data = encode(draw("yellow", "circle"))
    with (
        openai.OpenAI(base_url=shared.url + "/v1", api_key="one", max_retries=0) as first,
        openai.OpenAI(base_url=shared.url + "/v1", api_key="two", max_retries=0) as second,
    ):
        mine, yours = (sdk.files.create(file=data, purpose="vision").id for sdk in (first, second))
        assert mine != yours
        turn = {"role": "user", "content": [{"type": "file", "file": {"file_id": yours}}]}
        for attempt in (
            lambda: first.files.retrieve(yours),
            lambda: first.files.content(yours),
            lambda: first.files.delete(yours),
            lambda: first.chat.completions.create(model="internvl-demo", messages=[turn]),
        ):
            with pytest.raises(openai.NotFoundError):
                attempt()
        assert [file.id for file in second.files.list()] == [yours]
        assert first.files.delete(mine).deleted
        assert second.files.content(yours).content == data


def test_a_request_is_ended_by_its_own_key_alone_and_leaves_nothing(shared: Server) -> None:
    mine = {"Authorization": "Bearer one", "X-Request-Id": "mine"}
    body = {"prompt": [TEXT, "Hello"], "n": 2, "max_tokens": 3500, "ignore_eos": True}
    url = f"{shared.url}/v1/completions"
    with httpx.stream(
        "POST", url, json=body | {"stream": True}, headers=mine, timeout=60
    ) as stream:
        lines = (line for line in stream.iter_lines() if line)
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        for which, key, status in (("mine", "two", 404), (name, "two", 404), (name, "one", 200)):
            answer = httpx.delete(
                f"{shared.url}/v1/requests/{which}",
                headers={"Authorization": f"Bearer {key}"},
                timeout=60,
            )
            assert answer.status_code == status
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_aborted"
    assert done == "data: [DONE]"
    shared.wait_for_metric("internvl_kv_blocks_used", 0)
