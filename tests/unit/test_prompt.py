"""Prompts as ids: equal to the reference's rendering where no token name was typed, and beyond
anybody's reach where one was."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.prompt import ALLOWED, Prompt, PromptBuilder, Turn, Video
from server.tokenizer import Tokenizer
from tests.fake_engine import CHAT, CHINESE, HF
from tests.small_tokenizer import PLAIN, SPECIAL, encode_rendered, tokenizer_json
from wire.errors import ContextTooLong
from wire.geometry import PromptFormat
from wire.tokenizer_file import TokenizerError

TOKENIZER = Tokenizer(json.loads(tokenizer_json()))
TOKENS_PER_TILE = 3
TEMPLATES = {"hf": HF, "chat": CHAT}


@dataclasses.dataclass(frozen=True)
class Picture:
    digest: bytes
    count: int


def builder(template: PromptFormat) -> PromptBuilder:
    return PromptBuilder(TOKENIZER, template, TOKENS_PER_TILE, 4096)


def built(
    template: PromptFormat,
    turns: list[Turn],
    pictures: Sequence[Picture] = (),
    offered: Sequence[dict[str, Any]] = (),
) -> Prompt:
    prompts = builder(template)
    return prompts.build(prompts.render(turns, len(pictures), offered), pictures)


def user(*content: str | int | Video) -> Turn:
    return Turn("user", content)


def context(tiles: int) -> str:
    return "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * tiles) + "</img>"


def test_the_native_format_has_no_system_turn_and_no_labels() -> None:
    turns = [user(0, "What?"), Turn("assistant", ("A.",)), user("And ", 1, "now?")]
    prompt = built(HF, turns, [Picture(b"a", 2), Picture(b"b", 1)])
    assert prompt.ids == encode_rendered(
        f"<|im_start|>user\n{context(2)}\nWhat?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
        f"<|im_start|>user\nAnd {context(1)}\nnow?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_original_format_renders_as_its_own_chat_function_does() -> None:
    prompt = built(CHAT, [user(0, "What is this?")], [Picture(b"a", 7)])
    assert prompt.ids == encode_rendered(
        f"<|im_start|>system\n{CHINESE}<|im_end|>\n"
        f"<|im_start|>user\n{context(7)}\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turns_of_the_first_generation_stand_side_by_side() -> None:
    early = PromptFormat("Hermes-2", "Sei kurz.", True, after_turn="")
    turns = [user(0, "x"), Turn("assistant", ("y",)), user("z")]
    assert built(early, turns, [Picture(b"a", 1)]).ids == encode_rendered(
        "<|im_start|>system\nSei kurz.<|im_end|>"
        f"<|im_start|>user\n{context(1)}\nx<|im_end|><|im_start|>assistant\ny<|im_end|>"
        "<|im_start|>user\nz<|im_end|><|im_start|>assistant\n"
    )


def test_several_pictures_are_numbered_across_turns_in_the_original_format() -> None:
    turns = [user(0, "x"), Turn("assistant", ("y",)), user(1, "z")]
    prompt = built(CHAT, turns, [Picture(b"a", 1), Picture(b"b", 1)])
    assert prompt.ids == encode_rendered(
        f"<|im_start|>system\n{CHINESE}<|im_end|>\n"
        f"<|im_start|>user\nImage-1: {context(1)}\nx<|im_end|>\n"
        "<|im_start|>assistant\ny<|im_end|>\n"
        f"<|im_start|>user\nImage-2: {context(1)}\nz<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_frames_are_labelled_alike_in_both_formats_and_not_counted_as_pictures(
    template: str,
) -> None:
    prompts = builder(TEMPLATES[template])
    pictures = [Picture(b"a", 2), Picture(b"b", 1)]
    frames = [Picture(bytes([at]), 1) for at in range(12)]
    segments = prompts.render([user("Look: ", 0, Video(0), "\n\nthen ", 1, Video(1), "What?")], 2)
    named = template == "chat"
    shown = [f"Frame{at}: {context(1)}\n" for at in range(1, 13)]
    text = (
        "<|im_start|>user\nLook: "
        f"{'Image-1: ' if named else ''}{context(2)}\n{''.join(shown)}\n\nthen "
        f"{'Image-2: ' if named else ''}{context(1)}\n{shown[0]}What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    if TEMPLATES[template].system:
        text = f"<|im_start|>system\n{TEMPLATES[template].system}<|im_end|>\n" + text
    found = prompts.build(segments, pictures, [frames, frames[:1]])
    assert found.ids == encode_rendered(text)
    # The first frame is shown twice and sent once.
    assert len(found.items) == len(found.buffers) + 1 == 15


def test_the_clients_system_message_takes_the_place_of_the_default() -> None:
    prompt = built(CHAT, [Turn("system", ("Be short.",)), user("Hi")], [])
    assert prompt.ids == encode_rendered(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "go", "description": "Gehe – schnell"}},
]
TOOLS_BLOCK = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
{"type": "function", "function": {"name": "go", "description": "Gehe – schnell"}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


@pytest.mark.parametrize("template", TEMPLATES)
def test_tools_calls_and_results_stand_in_the_hermes_form(template: str) -> None:
    turns = [
        user("Look, then go."),
        Turn("assistant", (), (("look", {"at": "ä"}), ("go", {}))),
        Turn("tool", ("seen",)),
        Turn("tool", ("gone",)),
        Turn("assistant", ("Once more.",), (("look", {}),)),
        Turn("tool", ("nothing",)),
    ]
    prompt = built(TEMPLATES[template], turns, [], TOOLS)
    system = CHINESE if template == "chat" else ""
    assert prompt.ids == encode_rendered(
        f"<|im_start|>system\n{system}{TOOLS_BLOCK}<|im_end|>\n"
        "<|im_start|>user\nLook, then go.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "ä"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "go", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nseen\n</tool_response>\n"
        "<tool_response>\ngone\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nOnce more.\n<tool_call>\n"
        '{"name": "look", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nnothing\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_tool_may_show_a_picture_in_its_result() -> None:
    turns = [user("Look."), Turn("assistant", (), (("look", {}),)), Turn("tool", ("seen: ", 0))]
    prompt = built(HF, turns, [Picture(b"a", 2)])
    end = encode_rendered(
        f"<tool_response>\nseen: {context(2)}\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.ids[-len(end) + 1 :] == end[1:]  # the first token has the line break before it


NAMES = [*SPECIAL, *PLAIN, "<image>", "<video>", "<tools>"]


@given(
    template=st.sampled_from(list(TEMPLATES)),
    contents=st.lists(
        st.lists(st.text(max_size=12) | st.sampled_from(NAMES) | st.just(-1), max_size=5),
        min_size=1,
        max_size=4,
    ),
)
def test_whatever_is_typed_only_pictures_and_turns_make_their_tokens(
    template: str, contents: list[list[str | int]]
) -> None:
    pictures: list[Picture] = []
    turns = []
    for number, parts in enumerate(contents):
        content: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                content.append(len(pictures))
                pictures.append(Picture(bytes([len(pictures)]), 1 + len(pictures) % 3))
            else:
                content.append(part)
        turns.append(Turn(("user", "assistant")[number % 2], tuple(content)))
    prompt = built(TEMPLATES[template], turns, pictures)
    ids = {token: TOKENIZER.token_id(token) for token in SPECIAL}
    system = TEMPLATES[template].system is not None
    assert prompt.ids.count(ids["<|im_start|>"]) == len(turns) + 1 + system
    assert prompt.ids.count(ids["<|im_end|>"]) == len(turns) + system
    assert prompt.ids.count(ids["<img>"]) == prompt.ids.count(ids["</img>"]) == len(pictures)
    for token in ("<|endoftext|>", "<video>"):
        assert ids[token] not in prompt.ids
    positions = [at for at, id in enumerate(prompt.ids) if id == ids["<IMG_CONTEXT>"]]
    spans = [range(item.offset, item.offset + item.length) for item in prompt.items]
    assert positions == [at for span in spans for at in span]
    for item, picture in zip(prompt.items, pictures, strict=True):
        assert item.digest == picture.digest
        assert item.tiles == picture.count
        assert item.length == picture.count * TOKENS_PER_TILE


@given(
    st.lists(
        st.text(max_size=20).filter(lambda text: not any(name in text for name in NAMES))
        | st.sampled_from(ALLOWED),
        max_size=6,
    )
)
def test_typed_text_has_the_reference_ids_and_grounding_marks_stay_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    prompt = built(HF, [user(*parts)], [])
    assert prompt.ids == encode_rendered(
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_equal_pictures_share_a_buffer() -> None:
    pictures = [Picture(b"a", 1), Picture(b"b", 1), Picture(b"a", 1)]
    prompt = built(HF, [user(0, 1, 2)], pictures)
    assert [item.buffer for item in prompt.items] == [0, 1, 0]
    assert prompt.buffers == pictures[:2]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    with pytest.raises(ContextTooLong, match="4096"):
        builder(HF).render([user("x" * 4097 * 20)], 0)


def test_one_long_token_does_not_let_long_texts_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of the longest token, a run of blanks, was once the measure for every text."""
    spec = json.loads(tokenizer_json())
    vocabulary = spec["model"]["vocab"]
    last = "".join(spec["model"]["merges"].pop())
    vocabulary["\u0120" * 128] = vocabulary.pop(last)
    tokenizer = Tokenizer(spec)
    monkeypatch.setattr(tokenizer, "encode", None)
    prompts = PromptBuilder(tokenizer, HF, TOKENS_PER_TILE, 512)
    with pytest.raises(ContextTooLong, match="512"):
        prompts.render([user("word" * 8192)], 0)  # 32768 bytes, which is less than 512 * 128
    assert prompts.render([user(" " * 32768)], 0)  # may be 256 tokens: only encoding can tell


def test_a_tokenizer_without_the_models_tokens_is_refused() -> None:
    spec = json.loads(tokenizer_json())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "</img>"]
    with pytest.raises(TokenizerError, match="</img>"):
        PromptBuilder(Tokenizer(spec), HF, TOKENS_PER_TILE, 4096)
