"""The demo model's tokenizer: byte-level BPE in Qwen2's form, with InternVL's special tokens.

Same pre-tokeniser pattern, normaliser and added tokens as the published checkpoints; only the
vocabulary is small, because the model is.
"""

from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<video>",
]
PLAIN = frozenset(SPECIAL[SPECIAL.index("<tool_call>") : SPECIAL.index("<img>")])
"""Added tokens that are not special: they survive decoding."""

VOCAB = 1152


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Learn merges from ``corpus``; the added tokens fill the ids up to VOCAB exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    size = tokenizer.get_vocab_size()
    if size != VOCAB - len(SPECIAL):
        raise ValueError(f"the corpus gave {size} tokens; it is too poor for {VOCAB}")
    for name in SPECIAL:
        tokenizer.add_tokens([AddedToken(name, special=name not in PLAIN, normalized=False)])
    return tokenizer


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token; raises ValueError if the tokenizer has none of that name."""
    number = tokenizer.token_to_id(name)
    if number is None:
        raise ValueError(f"the tokenizer lacks {name}")
    return int(number)
