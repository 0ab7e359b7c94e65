"""A byte-level BPE in Qwen2's form with InternVL's added tokens, made in milliseconds."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>"),
]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|file_sep|>"]

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "system user assistant tool Image-1: Frame1: You are a helpful assistant.",
    "What is in this picture? A red circle, a blue square and a green triangle. Hello! Yes. No.",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} naïve café',
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室",
]


@functools.cache
def tokenizer_json() -> str:
    """The text of its tokenizer.json."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return tokenizer.to_str()


@functools.cache
def reference() -> Tokenizer:
    """The library's own view of it, in which token names in a text are tokens."""
    return Tokenizer.from_str(tokenizer_json())


def encode_rendered(text: str) -> list[int]:
    """Ids of a whole rendered prompt, as a reference implementation makes them."""
    return list(reference().encode(text, add_special_tokens=False).ids)


def save(folder: Path, *, do_sample: bool | None = False) -> Path:
    """A checkpoint folder as far as the front end reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    if do_sample is not None:
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": do_sample}))
    return folder
