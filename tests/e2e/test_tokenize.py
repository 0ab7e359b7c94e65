"""Tokens of texts and chats, and renderings, of the demo model through a socket: they are what the
engine gets."""

import unicodedata
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo import CHECKPOINT
from server.tokenizer import Tokenizer
from tests.servers import Server, data_uri, draw, encode, part

TOKENS = Tokenizer.load(CHECKPOINT)
CONTEXT, PICTURE = map(TOKENS.token_id, ("<IMG_CONTEXT>", "<img>"))
TEXT = {"role": "user", "content": "Hello!"}
CIRCLE = draw("red", "circle", (300, 200))
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def post(server: Server, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part(item) for item in content]}


def film(*colours: str) -> dict[str, Any]:
    frames = [data_uri(encode(draw(colour, "square"))) for colour in colours]
    return {"type": "video_url", "video_url": {"frames": frames}}


CHATS: dict[str, dict[str, Any]] = {
    "text": {"messages": [TEXT]},
    "pictures": {"messages": [user(CIRCLE, "and", draw("blue", "square"), "?")]},
    "video": {"messages": [user("Look:", film("red", "green", "blue"), CIRCLE)]},
    "tools": {"messages": [user(CIRCLE)], "tools": [TOOL]},
    "budget": {"messages": [user(CIRCLE, CIRCLE)], "visual_budget": {"max_tiles": 4}},
    "continued": {
        "messages": [TEXT, {"role": "assistant", "content": "A <box>"}],
        "continue_final_message": True,
    },
    "closed": {"messages": [TEXT], "add_generation_prompt": False},
}


@pytest.mark.parametrize("name", CHATS)
def test_a_rendering_is_what_the_engine_gets(demo_server: Server, name: str) -> None:
    body = CHATS[name]
    found = post(demo_server, "/v1/chat/completions/render", body)
    asked = {"max_tokens": 1, "prompt_logprobs": 0}
    answer = post(demo_server, "/v1/chat/completions", body | asked)
    ids = found["token_ids"]
    assert len(ids) == found["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    # All tokens but the first are reported with their log-probabilities.
    assert [str(token) for token in ids[1:]] == [
        next(iter(p)) for p in answer["prompt_logprobs"][1:]
    ]
    spans = [tuple(span) for shown in found["parts"] for span in shown["spans"]]
    inside = {at for begin, length in spans for at in range(begin, begin + length)}
    assert {ids[at] for at in inside} == ({CONTEXT} if spans else set())
    assert len(inside) == ids.count(CONTEXT)
    assert all(ids[begin - 1] == PICTURE for begin, _ in spans)
    media = answer["usage"].get("internvl", {"images": [], "videos": []})
    tiles = [one["tiles"] for one in (*media["images"], *media["videos"])]
    assert sorted(tiles) == sorted(shown["tiles"] for shown in found["parts"])
    tokens = post(demo_server, "/tokenize", body)
    assert tokens == {
        "count": len(ids),
        "max_model_len": found["max_model_len"],
        "tokens": ids,
        "token_strs": None,
    }
    assert post(demo_server, "/detokenize", {"tokens": ids}) == {"prompt": found["prompt"]}


def test_a_rendered_chat_without_pictures_is_a_completion(demo_server: Server) -> None:
    found = post(demo_server, "/v1/chat/completions/render", CHATS["text"])
    options = {"temperature": 0, "max_tokens": 16}
    chat = post(demo_server, "/v1/chat/completions", CHATS["text"] | options)
    said = chat["choices"][0]["message"]["content"]
    for prompt in (found["prompt"], found["token_ids"]):
        text = post(demo_server, "/v1/completions", {"prompt": prompt} | options)
        assert text["choices"][0]["text"] == said


# The tokenizer writes characters in one of their forms, as Python does of those both know.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])


@settings(max_examples=40, deadline=None)
@given(st.text(KNOWN, max_size=60) | st.text("<>|/_imgboxrefIMGCONTEXT ", max_size=40))
def test_a_text_comes_back_from_its_tokens(demo_server: Server, text: str) -> None:
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        for special in (True, False):
            body = {"prompt": text, "parse_special": special, "return_token_strs": True}
            found = client.post("/tokenize", json=body).json()
            assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
            again = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
            assert again == {"prompt": unicodedata.normalize("NFC", text)}


def test_nothing_is_generated_or_decoded(demo_server: Server) -> None:
    counted = ("internvl_prompt_tokens_total", "internvl_encoded_tiles_total")
    before = [demo_server.metric(name) for name in counted]
    picture = draw("yellow", "triangle", (333, 111))
    damaged = encode(picture)[:-40]
    found = post(
        demo_server, "/v1/chat/completions/render", {"messages": [user(data_uri(damaged))]}
    )
    assert found["parts"][0]["tiles"] > 1
    assert [demo_server.metric(name) for name in counted] == before
    post(demo_server, "/v1/chat/completions", {"messages": [user(data_uri(damaged))]}, 400)
