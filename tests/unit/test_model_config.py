"""config.json of both formats, in the spellings that exist."""

import errno
import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import pytest

from model import CheckpointError, ModelConfig, load_config, skeleton
from model.config import EARLY_SYSTEM_SENTENCE, SYSTEM_SENTENCE
from server.checkpoint import with_model
from server.tokenizer import Tokenizer
from tests import small_tokenizer
from tests.checkpoints import INTERNVL3_1B, SIX_B_LIKE, Shape, make_checkpoint
from wire.geometry import PromptFormat
from wire.settings import EngineSettings, SettingError, Settings
from wire.tokenizer_file import TokenizerError


def edit(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """Change entries of a JSON file; keys with a dot reach into an object; None deletes."""
    path = folder / name
    values = json.loads(path.read_text())
    for key, value in changes.items():
        target = values
        *parents, leaf = key.split("__")
        for parent in parents:
            target = target[parent]
        if value is None:
            target.pop(leaf, None)
        else:
            target[leaf] = value
    path.write_text(json.dumps(values))
    return folder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "chat", format="chat")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_config(folder)
    return str(raised.value)


def test_both_formats_describe_the_same_model(hf: Path, chat: Path) -> None:
    a, b = load_config(hf), load_config(chat)
    assert (a.vision, a.projector, a.text) == (b.vision, b.projector, b.text)
    assert a.geometry == b.geometry
    assert (a.format, b.format) == ("hf", "chat")


def test_the_published_shape_is_read(tmp_path: Path) -> None:
    config = load_config(
        make_checkpoint(tmp_path, format="chat", shape=INTERNVL3_1B, weights=False)
    )
    assert config.max_model_len == 32768
    assert config.geometry.tile_size == 448
    assert config.geometry.tokens_per_tile == 256
    assert (config.text.vocab_size, config.text.head_dim, config.text.tied) == (151674, 64, False)
    assert (config.vision.heads, config.vision.grid, config.vision.norm) == (16, 32, "layer_norm")


def test_special_tokens_come_from_the_tokenizer_by_name(hf: Path) -> None:
    config = load_config(hf)
    tokenizer = small_tokenizer.reference()
    assert config.image_token_id == tokenizer.token_to_id("<IMG_CONTEXT>")
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert list(config.eos_token_ids) == ends  # config.json says 0


def test_a_wrong_image_token_id_is_reported_and_not_used(
    hf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(hf, image_token_id=3)
    with caplog.at_level(logging.WARNING):
        config = load_config(hf)
    assert config.image_token_id != 3
    assert "image_token_id is 3" in caplog.text


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>"])
def test_a_tokenizer_without_the_special_tokens_is_refused(hf: Path, token: str) -> None:
    path = hf / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(token, "<other>"), encoding="utf-8")
    assert f"has no token {token}" in refusal(hf)


def test_a_missing_or_broken_tokenizer_is_refused(hf: Path) -> None:
    (hf / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read" in refusal(hf)
    (hf / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(hf)


def test_a_slow_tokenizer_states_its_special_tokens_too(hf: Path) -> None:
    before = load_config(hf)
    path = hf / "tokenizer.json"
    added = json.loads(path.read_text())["added_tokens"]
    path.unlink()
    slow = hf / "tokenizer_config.json"
    slow.write_text(json.dumps({"added_tokens_decoder": {t["id"]: t for t in added}}))
    after = load_config(hf)
    assert (after.image_token_id, after.eos_token_ids) == (
        before.image_token_id,
        before.eos_token_ids,
    )
    slow.write_text('{"added_tokens_decoder": [1]}')
    assert "does not list the added tokens" in refusal(hf)
    # As older versions of transformers wrote it.
    slow.write_text("{}")
    old = hf / "added_tokens.json"
    old.write_text(json.dumps({token["content"]: token["id"] for token in added}))
    assert load_config(hf) == after
    slow.unlink()
    assert load_config(hf) == after
    old.write_text('{"<img>": "first"}')
    assert "added_tokens.json: <img> must be" in refusal(hf)


def test_a_special_token_outside_the_vocabulary_is_refused(hf: Path) -> None:
    edit(hf, text_config__vocab_size=300)
    assert "the model knows only 300" in refusal(hf)


@pytest.mark.parametrize("value", [56, [56, 56]])
def test_sizes_are_numbers_or_pairs(hf: Path, value: Any) -> None:
    edit(hf, vision_config__image_size=value, vision_config__patch_size=[14, 14])
    assert load_config(hf).vision.grid == 4


def test_a_size_that_is_not_square_is_refused(hf: Path) -> None:
    edit(hf, vision_config__image_size=[56, 112])
    assert "image_size must be a square" in refusal(hf)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e6},
        {"rope_theta": 5e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "dynamic", "type": "dynamic"}},
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}},
    ],
)
def test_every_spelling_of_the_rotary_base_is_read(hf: Path, spelling: dict[str, Any]) -> None:
    edit(hf, text_config__rope_parameters=None)
    edit(hf, **{"text_config__" + key: value for key, value in spelling.items()})
    assert load_config(hf).text.rope_theta == 5e6


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3", "mrope"])
def test_scalings_that_change_positions_in_range_are_refused(hf: Path, kind: str) -> None:
    edit(hf, text_config__rope_scaling={"type": kind, "factor": 2.0})
    assert kind in refusal(hf)


@pytest.mark.parametrize("format", ["hf", "chat"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float16", "torch.float16"])
def test_both_spellings_of_the_type_are_read(
    tmp_path: Path, format: str, key: str, value: str
) -> None:
    folder = make_checkpoint(tmp_path, format=format)
    edit(folder, dtype=None, torch_dtype=None)
    assert load_config(folder).dtype == "bfloat16"
    assert load_config(edit(folder, **{key: value})).dtype == "float16"


@pytest.mark.parametrize(
    ("format", "top", "inner", "tied"),
    [
        ("hf", None, None, True),  # the class's default
        ("hf", None, False, False),
        ("hf", True, None, True),
        ("chat", None, None, False),
        ("chat", None, True, True),
    ],
)
def test_missing_tie_flags_mean_what_the_format_means(
    tmp_path: Path, format: str, top: bool | None, inner: bool | None, tied: bool
) -> None:
    folder = make_checkpoint(tmp_path, format=format)
    text = "text_config" if format == "hf" else "llm_config"
    edit(folder, **{"tie_word_embeddings": top, f"{text}__tie_word_embeddings": inner})
    assert load_config(folder).text.tied is tied


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "quant_method is 'fp8'; supported: awq"),
        ("text_config__", "quant_method is 'fp8'; supported: awq"),
        ("vision_config__", "the encoder has 16 bits only"),
    ],
)
def test_quantised_weights_are_found_wherever_they_are_mentioned(
    hf: Path, where: str, message: str
) -> None:
    edit(hf, **{where + "quantization_config": {"quant_method": "fp8"}})
    assert message in refusal(hf)


@pytest.mark.parametrize("where", ["", "text_config__", "vision_config__"])
def test_an_empty_mention_is_none(hf: Path, where: str) -> None:
    edit(hf, **{where + "quantization_config": {}})
    assert load_config(hf).awq is None


def test_an_unknown_architecture_is_refused_with_what_is_known(hf: Path) -> None:
    edit(hf, architectures=["LlavaForConditionalGeneration"])
    message = refusal(hf)
    assert "LlavaForConditionalGeneration" in message
    assert "InternVLChatModel, InternVLForConditionalGeneration" in message


def test_an_unknown_language_model_is_refused_with_what_is_known(hf: Path) -> None:
    edit(hf, text_config__architectures=["Phi3ForCausalLM"], text_config__model_type="phi3")
    message = refusal(hf)
    assert "Phi3ForCausalLM" in message
    assert "Qwen2ForCausalLM" in message


def test_model_types_do_where_architectures_are_missing(hf: Path) -> None:
    edit(hf, architectures=None, text_config__architectures=None)
    assert load_config(hf).format == "hf"


def test_names_copied_from_other_models_mean_nothing(hf: Path) -> None:
    before = load_config(hf)
    edit(hf, _name_or_path="InternViT-6B", text_config___name_or_path="Qwen2.5-32B-Instruct")
    assert load_config(hf) == before


def test_a_bias_in_the_mlp_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shape=Shape(backbone="LlamaForCausalLM"), weights=False)
    assert "mlp_bias is set" in refusal(edit(folder, text_config__mlp_bias=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config__use_sliding_window": True}, "sliding windows"),
        ({"text_config__hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"text_config__hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"text_config__num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"text_config__num_hidden_layers": -1}, "must be a whole number from 1 to 512"),
        # Each would be built before its weights are missed.
        ({"text_config__num_hidden_layers": 10**9}, "must be a whole number from 1 to 512"),
        ({"vision_config__num_hidden_layers": 10**9}, "must be a whole number from 1 to 512"),
        ({"text_config__vocab_size": 10**30}, "vocab_size must be a whole number from 1 to"),
        ({"text_config__rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        ({"text_config__rms_norm_eps": float("inf")}, "rms_norm_eps must be a finite number"),
        ({"text_config__rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"downsample_ratio": 1e-320}, "downsample_ratio must be 1 over a whole number"),
        ({"text_config__num_key_value_heads": 3}, "does not divide"),
        ({"vision_config__hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"vision_config__norm_type": "batch"}, "norm_type is 'batch'"),
        ({"vision_config__num_attention_heads": 5}, "must divide hidden_size"),
        ({"vision_config__use_absolute_position_embeddings": False}, "is not supported"),
        ({"vision_feature_layer": -9}, "no vision_feature_layer -9"),
        ({"vision_feature_layer": [-1, -2]}, "no vision_feature_layer [-1, -2]"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy is 'full'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio"),
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": []}, "text_config must be an object"),
        ({"architectures": "InternVLChatModel"}, "architectures must be a list"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
    ],
)
def test_what_cannot_be_served_is_named(hf: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(edit(hf, **changes))


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    shape = Shape(backbone="Qwen3MoeForCausalLM", text_bias=False, experts=4)
    folder = make_checkpoint(tmp_path, shape=shape, weights=False)
    before = load_config(folder)
    edit(folder, text_config__num_experts=None, text_config__num_local_experts=4)
    assert load_config(folder) == before
    edit(folder, text_config__num_experts_per_tok=5)
    assert "5 is above num_local_experts 4" in refusal(folder)


def test_experts_without_number_are_refused(tmp_path: Path) -> None:
    shape = Shape(backbone="Qwen3MoeForCausalLM", text_bias=False, experts=4)
    folder = make_checkpoint(tmp_path, shape=shape, weights=False)
    assert "num_experts must be" in refusal(edit(folder, text_config__num_experts=10**9))


def test_a_model_beyond_all_memory_is_refused(hf: Path) -> None:
    most = 1 << 24
    edit(hf, text_config__head_dim=most, text_config__num_attention_heads=most)
    edit(hf, text_config__num_key_value_heads=most, text_config__hidden_size=most)
    config = load_config(hf)
    with pytest.raises(CheckpointError, match=r"config.json is of no model: .* overflowed"):
        skeleton(config, tied=False)


def test_a_folder_that_may_not_be_entered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(path: Path, *, follow_symlinks: bool = True) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "is_dir", stat)
    assert refusal(tmp_path) == f"{tmp_path} cannot be read: Permission denied"
    with pytest.raises(SettingError, match=r"--model: .* cannot be read: .*Permission denied"):
        with_model(Settings(engine=EngineSettings(model=str(tmp_path))))


def test_a_tokenizer_that_its_library_panics_at_is_refused(hf: Path) -> None:
    path = hf / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "YWJj"}
    path.write_text(json.dumps(spec), encoding="utf-8")
    assert "tokenizer.json cannot be read" in refusal(hf)
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(hf)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "config.json does not exist" in refusal(tmp_path)
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("not json")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(tmp_path)


def test_chat_geometry_is_in_the_config(chat: Path) -> None:
    edit(chat, min_dynamic_patch=2, max_dynamic_patch=6, use_thumbnail=False, force_image_size=112)
    geometry = load_config(chat).geometry
    assert (geometry.min_tiles, geometry.max_tiles, geometry.use_thumbnail) == (2, 6, False)
    assert (geometry.tile_size, geometry.tokens_per_tile) == (112, 16)
    geometry = load_config(edit(chat, force_image_size=None)).geometry
    assert geometry.tile_size == 56
    geometry = load_config(edit(chat, dynamic_image_size=False)).geometry
    assert (geometry.min_tiles, geometry.max_tiles, geometry.use_thumbnail) == (1, 1, False)


def test_hf_geometry_is_in_the_preprocessor(hf: Path) -> None:
    name = "preprocessor_config.json"
    edit(hf, name, min_patches=2, max_patches=6, crop_to_patches=False, image_mean=[0.1, 0.2, 0.3])
    geometry = load_config(hf).geometry
    assert (geometry.min_tiles, geometry.max_tiles, geometry.use_thumbnail) == (2, 6, True)
    assert geometry.mean == (0.1, 0.2, 0.3)
    assert geometry.std == (0.229, 0.224, 0.225)


def test_hf_geometry_inside_the_processor_file_comes_first(hf: Path) -> None:
    inner = {"size": {"height": 112, "width": 112}, "max_patches": 4}
    (hf / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    geometry = load_config(hf).geometry
    assert (geometry.tile_size, geometry.tokens_per_tile, geometry.max_tiles) == (112, 16, 4)


def test_hf_geometry_has_defaults_without_a_preprocessor(hf: Path) -> None:
    (hf / "preprocessor_config.json").unlink()
    geometry = load_config(hf).geometry
    assert (geometry.tile_size, geometry.max_tiles) == (56, 12)
    assert geometry.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 56, "width": 112}}, "size must be a square"),
        ({"size": {"height": 60, "width": 60}}, "cannot be cut into patches"),
        ({"size": {"height": 70, "width": 70}}, "cannot be cut into patches"),
        ({"min_patches": 7, "max_patches": 6}, "6 is below min_patches 7"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(
    hf: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(edit(hf, "preprocessor_config.json", **changes))


def test_prompt_formats_follow_the_checkpoint(hf: Path, chat: Path) -> None:
    assert load_config(hf).prompt_format == PromptFormat("hf", None, False)
    assert load_config(chat).prompt_format == PromptFormat("internvl2_5", SYSTEM_SENTENCE, True)
    edit(chat, system_message="You see.")
    assert load_config(chat).prompt_format == PromptFormat("internvl2_5", "You see.", True)


@pytest.mark.parametrize("template", ["Hermes-2", "internlm2-chat"])
def test_the_first_generations_conversations_are_known_by_name(chat: Path, template: str) -> None:
    found = load_config(edit(chat, template=template)).prompt_format
    assert found == PromptFormat(template, EARLY_SYSTEM_SENTENCE, True, after_turn="")


def test_a_conversation_that_nobody_knows_is_refused(chat: Path) -> None:
    message = refusal(edit(chat, template="phi3-chat"))
    assert "template is 'phi3-chat'; supported: internvl2_5, Hermes-2, internlm2-chat" in message


def test_the_default_system_sentence_is_the_published_one() -> None:
    assert len(SYSTEM_SENTENCE) == 58
    assert SYSTEM_SENTENCE.startswith("你是书生·万象，英文名是InternVL，")


def test_the_pixel_shuffle_version_defaults_to_the_first(chat: Path) -> None:
    assert load_config(chat).projector.version == "v2"
    assert load_config(edit(chat, ps_version=None)).projector.version == "v1"


def test_the_large_tower_is_read_in_both_formats(tmp_path: Path) -> None:
    configs: list[ModelConfig] = [
        load_config(make_checkpoint(tmp_path / f, format=f, shape=SIX_B_LIKE))
        for f in ("hf", "chat")
    ]
    for config in configs:
        assert (config.vision.norm, config.vision.qkv_bias, config.vision.qk_norm) == (
            "rms_norm",
            False,
            True,
        )
