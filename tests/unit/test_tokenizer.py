"""Text to ids and ids to bytes, for both families of tokenizers and without tokenizer.json."""

import io
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Reference
from tokenizers.models import BPE

from server.tokenizer import Tokenizer
from tests import small_tokenizer
from tests.small_tokenizer import encode_rendered, reference
from wire.tokenizer_file import TokenizerError

TOKENIZER = Tokenizer(json.loads(small_tokenizer.tokenizer_json()))


@given(st.text())
def test_text_without_token_names_has_the_reference_ids(text: str) -> None:
    assume(not any(name in text for name in small_tokenizer.SPECIAL))
    assert TOKENIZER.encode(text) == encode_rendered(text)


@given(st.text() | st.text("\u0301\u0308aeou \u1100\u1161\u11a8", max_size=500))
def test_no_text_has_fewer_tokens_than_the_least(text: str) -> None:
    assert TOKENIZER.least(text, 10_000) <= len(TOKENIZER.encode(text))


def test_the_least_of_a_long_text_is_not_far_off_and_is_counted_as_far_as_asked() -> None:
    text = "What is in this picture? " * 20_000
    tokens = len(TOKENIZER.encode(text))
    assert tokens / 4 < TOKENIZER.least(text, tokens) <= tokens
    assert 100 <= TOKENIZER.least(text, 100) < tokens / 5


@pytest.mark.parametrize("name", [*small_tokenizer.SPECIAL, *small_tokenizer.PLAIN])
def test_no_token_name_is_a_token_in_text(name: str) -> None:
    ids = TOKENIZER.encode(f"a {name} b")
    assert TOKENIZER.token_id(name) not in ids
    assert reference().decode(ids, skip_special_tokens=False) == f"a {name} b"


def test_tokens_are_found_by_their_whole_name() -> None:
    assert TOKENIZER.token_id("<|im_end|>") == encode_rendered("<|im_end|>")[0]
    assert TOKENIZER.token_id("<|im_end|") is None
    assert TOKENIZER.token_id("<|im_end|>") in TOKENIZER.special_ids
    assert TOKENIZER.token_id("<tool_call>") not in TOKENIZER.special_ids
    assert TOKENIZER.bos == ()


@given(st.lists(st.integers(0, reference().get_vocab_size() + 5), max_size=30))
def test_bytes_of_tokens_are_the_reference_text(ids: list[int]) -> None:
    data = b"".join(map(TOKENIZER.token_bytes, ids))
    expected = reference().decode(ids, skip_special_tokens=False)
    assert data.decode("utf-8", "replace") == expected


def sentencepiece_like() -> Reference:
    """As InternLM's: bytes by name, blanks as U+2581, a token before every prompt."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a", "\u2581b", "ab"]
    model = BPE(
        {piece: number for number, piece in enumerate(pieces)},
        [("\u2581", "a"), ("\u2581", "b"), ("a", "b")],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Reference(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    return tokenizer


def test_a_sentencepiece_tokenizer_is_decoded_too() -> None:
    source = sentencepiece_like()
    tokenizer = Tokenizer(json.loads(source.to_str()))
    ids = tokenizer.encode(" a b é")
    assert ids == source.encode(" a b é", add_special_tokens=False).ids
    text = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert text.removeprefix(" ") == source.decode(ids)
    assert tokenizer.strips_first_space


CORPUS = [
    line
    for path in sorted(Path(__file__).parents[2].glob("docs/*.md"))
    for line in path.read_text(encoding="utf-8").splitlines()
]
# What a checkpoint adds to its SentencePiece model: names of its own for ids it had, and new ones.
ADDED = {
    0: "<unk>", 1: "<s>", 2: "</s>", 5: "<|im_end|>",
    1000: "<img>", 1001: "</img>", 1002: "<IMG_CONTEXT>",
}  # fmt: skip


@pytest.fixture(scope="module", params=["as InternLM's", "with a space before every text", "NFKC"])
def sentences(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceProcessor, Path]:
    """A model that SentencePiece has trained, and a checkpoint's folder that holds it."""
    folder, written = tmp_path_factory.mktemp("sentences"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        add_dummy_prefix=request.param != "as InternLM's",
        normalization_rule_name="nfkc" if request.param == "NFKC" else "identity",
        remove_extra_whitespaces=request.param == "NFKC",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    added = {str(number): {"content": name, "special": True} for number, name in ADDED.items()}
    # A class of the checkpoint's own, whose code is not run.
    settings = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return SentencePieceProcessor(model_proto=written.getvalue()), folder


def test_a_sentencepiece_model_is_converted(sentences: tuple[SentencePieceProcessor, Path]) -> None:
    reference, folder = sentences
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos == (1,)
    assert {tokenizer.token_id(name): name for name in ADDED.values()} == ADDED
    assert tokenizer.special_ids == set(ADDED)
    random = Random(0)
    alphabet = "aaeetttss   \n\t.,-_=017äé中文你好ﬁ①\u3000🙂<s>"
    made = ["".join(random.choices(alphabet, k=random.randrange(40))) for _ in range(2000)]
    for line in CORPUS + made:
        ids = tokenizer.encode(line)
        assert ids == reference.encode(line), line
        text = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert text.removeprefix(" " * tokenizer.strips_first_space) == reference.decode(ids)


def test_another_sentencepiece_model_is_refused_by_its_kind(tmp_path: Path) -> None:
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four"] * 9),
        model_writer=written,
        vocab_size=15,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    with pytest.raises(TokenizerError, match="is not of byte-pair encoding"):
        Tokenizer.load(tmp_path)


@pytest.mark.slow
def test_a_checkpoint_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    """The original checkpoints hold vocab.json and merges.txt only."""
    spec = json.loads(small_tokenizer.tokenizer_json())
    vocabulary = spec["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    merges = "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    added = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in spec["added_tokens"]
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": added,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "bos_token": None,
                "unk_token": None,
            }
        )
    )
    converted = Tokenizer.load(tmp_path)
    for text in ("What is in this picture?\n", "naïve 12 <img>"):
        assert converted.encode(text) == TOKENIZER.encode(text)
    for name in small_tokenizer.SPECIAL:
        assert converted.token_id(name) == TOKENIZER.token_id(name)
    assert TOKENIZER.special_ids <= converted.special_ids


def test_a_folder_without_any_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)


def test_a_conversion_that_takes_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wire.tokenizer_file.CONVERT_TIMEOUT", 0.001)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(TokenizerError, match="within"):
        Tokenizer.load(tmp_path)


def test_converting_loads_no_torch_into_this_process() -> None:
    code = "import sys, server.tokenizer; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
