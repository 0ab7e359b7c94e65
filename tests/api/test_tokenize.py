"""/tokenize, /detokenize and /v1/chat/completions/render: shapes and refusals."""

from typing import Any

import pytest

from server.schemas.tokens import MAX_CHARACTERS
from tests.api.conftest import House, Houses
from tests.api.test_errors import error_of
from tests.fake_engine import FakeEngine, make_ready
from tests.small_tokenizer import encode_rendered, reference

HELLO: Any = [{"role": "user", "content": "Hello!"}]
NAMED = "<|im_start|>user<tool_call>é<IMG_CONTEXT>"


async def test_names_of_tokens_are_those_but_for_the_one_that_stands_for_pixels(
    house: House,
) -> None:
    answer = await house.http.post("/tokenize", json={"prompt": NAMED, "return_token_strs": True})
    found = answer.json()
    ids = encode_rendered("<|im_start|>user<tool_call>é")
    assert found["tokens"][: len(ids)] == ids
    assert encode_rendered("<IMG_CONTEXT>")[0] not in found["tokens"]
    assert found["token_strs"] == [reference().id_to_token(token) for token in found["tokens"]]
    assert found["max_model_len"] == 512
    # A text may be longer than the context.
    long = await house.http.post("/tokenize", json={"prompt": "Hello! " * 1000})
    assert long.json()["count"] > 1000


async def test_what_does_not_fit_is_counted_but_not_rendered(houses: Houses) -> None:
    house = await houses.open(FakeEngine(make_ready(max_model_len=20)))
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,a"}}
    body = {"messages": [{"role": "user", "content": [picture] * 4}]}
    counted = (await house.http.post("/tokenize", json=body)).json()
    assert counted["count"] > 20
    answer = await house.ask(**body)
    assert error_of(answer)["code"] == "context_length_exceeded"
    for asked in (body, {"messages": HELLO, "max_tokens": 500}):
        refused = await house.http.post("/v1/chat/completions/render", json=asked)
        assert error_of(refused)["code"] == "context_length_exceeded"
    assert not house.engine.requests


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "x" * (MAX_CHARACTERS + 1)}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "model": "other"}, "model"),
        ("/tokenize", {"messages": HELLO, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 2, 9999]}, "tokens[2]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/detokenize", {"tokens": [], "model": "other"}, "model"),
        ("/v1/chat/completions/render", {}, "messages"),
        ("/v1/chat/completions/render", {"messages": HELLO, "tools": {}}, "tools"),
        ("/v1/chat/completions/render", {"messages": HELLO, "model": "x"}, "model"),
    ],
)
async def test_what_is_wrong_is_named(
    house: House, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await house.http.post(path, json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert error_of(answer)["param"] == param


async def test_an_unknown_field_is_told(houses: Houses) -> None:
    easy, strict = await houses.open(), await houses.open(strict_fields=True)
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": HELLO}),
        ("/detokenize", {"tokens": []}),
        ("/v1/chat/completions/render", {"messages": HELLO}),
    ):
        answer = await easy.http.post(path, json=body | {"wrong": 1})
        assert answer.headers["X-InternVL-Ignored-Fields"] == "wrong"
        answer = await strict.http.post(path, json=body | {"wrong": 1})
        assert error_of(answer)["param"] == "wrong"
