"""config.json of both checkpoint formats to one ``ModelConfig``.

Called by the engine when it loads. Every dimension comes from the folder's files; token ids come
from the tokenizer by their strings, because configs copied between models carry wrong ones.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model import awq
from model.backbones import BACKBONES
from model.backbones.backbone import Backbone
from model.schema import (
    DTYPES,
    MOST_PARTS,
    CheckpointError,
    ModelConfig,
    ProjectorConfig,
    Section,
    TextConfig,
    VisionConfig,
    read_json,
)
from wire.geometry import PromptFormat, VisionGeometry

__all__ = ["CheckpointError", "ModelConfig", "load_config"]

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<IMG_CONTEXT>"  # noqa: S105 - not a password
END_OF_TURN = "<|im_end|>"
ENDS_OF_TEXT = ("<|endoftext|>", "</s>")
"""Qwen's and InternLM's: the first that there is, for to Qwen the other is a word like any."""
SYSTEM_SENTENCE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
EARLY_SYSTEM_SENTENCE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
TEMPLATES = {
    "internvl2_5": (SYSTEM_SENTENCE, "\n"),
    "Hermes-2": (EARLY_SYSTEM_SENTENCE, ""),
    "internlm2-chat": (EARLY_SYSTEM_SENTENCE, ""),
}
"""The original checkpoints' conversations by name (conversation.py in their repository): the system
sentence, and what follows the end of a turn."""
FORMATS = {"InternVLChatModel": "chat", "InternVLForConditionalGeneration": "hf"}
_QUANTIZED = "quantization_config"
MODEL_TYPES = {"internvl_chat": "chat", "internvl": "hf"}


def load_config(folder: Path) -> ModelConfig:
    """Read a checkpoint folder's configuration. Raises CheckpointError saying what is wrong."""
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    root = read_json(folder / "config.json")
    format_name = _format(root)
    chat = format_name == "chat"
    text = root.section("llm_config" if chat else "text_config")
    vision_section = root.section("vision_config")
    if vision_section.values.get(_QUANTIZED):
        raise vision_section.error(_QUANTIZED, "is set; the encoder has 16 bits only")
    # Quantised copies say so at the top, or where the language model is told of; others may say
    # null or {}.
    quantized = [s.section(_QUANTIZED) for s in (root, text) if s.values.get(_QUANTIZED)]
    text_config = _text(root, text, chat)
    factor = _downsampling(root)
    vision = _chat_vision(root, vision_section) if chat else _hf_vision(root, vision_section)
    tile_size, geometry = _geometry(folder, root, vision_section, chat)
    side, rest = divmod(tile_size // vision.patch_size, factor)
    if tile_size % vision.patch_size or rest:
        raise CheckpointError(
            f"{root.name}: tiles of {tile_size} pixels cannot be cut into patches of "
            f"{vision.patch_size} pixels, {factor} by {factor} of which become one token"
        )
    image_token_id, eos_token_ids = _tokens(folder, root, text_config.vocab_size)
    version = root.choice("ps_version", "v1", ("v1", "v2")) if chat else "v2"
    return ModelConfig(
        format=format_name,
        vision=vision,
        projector=ProjectorConfig(
            factor, version, vision.hidden_size * factor * factor, text_config.hidden_size
        ),
        text=text_config,
        geometry=VisionGeometry(tile_size=tile_size, tokens_per_tile=side * side, **geometry),
        prompt_format=_prompt_format(root, chat),
        image_token=IMAGE_TOKEN,
        image_token_id=image_token_id,
        eos_token_ids=eos_token_ids,
        dtype=_dtype(root, text),
        awq=awq.read(quantized[0]) if quantized else None,
    )


def _architecture(section: Section) -> str | None:
    names = section.values.get("architectures")
    if names is None:
        return None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise section.error("architectures", "must be a list of names")
    return names[0]


def _format(root: Section) -> str:
    name = _architecture(root)
    model_type = root.values.get("model_type")
    found = FORMATS.get(name) if name is not None else MODEL_TYPES.get(str(model_type))
    if found is None:
        raise CheckpointError(
            f"{root.name}: architecture {name or model_type!r} is not supported; supported: "
            + ", ".join(FORMATS)
        )
    return found


def _backbone(text: Section) -> tuple[str, Backbone]:
    name = _architecture(text)
    model_type = text.values.get("model_type")
    for architecture, backbone in BACKBONES.items():
        if name == architecture or (name is None and model_type == backbone.model_type):
            return architecture, backbone
    raise CheckpointError(
        f"{text.name}: language model {name or model_type!r} is not supported; supported: "
        + ", ".join(BACKBONES)
    )


def _text(root: Section, text: Section, chat: bool) -> TextConfig:
    _, backbone = _backbone(text)
    flags = [s.flag("tie_word_embeddings", False) for s in (root, text)]
    mentioned = root.has("tie_word_embeddings") or text.has("tie_word_embeddings")
    # Without any flag the native class ties and the original one does not.
    return backbone.text_config(text, any(flags) or not (chat or mentioned))


def _downsampling(root: Section) -> int:
    ratio = root.number("downsample_ratio", 0.5)
    factor = round(1 / max(ratio, 1e-6))
    if factor < 1 or abs(factor * ratio - 1) > 1e-6:
        raise root.error("downsample_ratio", f"must be 1 over a whole number, got {ratio}")
    return factor


def _chat_vision(root: Section, section: Section) -> VisionConfig:
    return _vision(
        section,
        selected=root.values.get("select_layer", -1),
        selected_name="select_layer",
        qkv_bias=section.flag("qkv_bias", False),
        qk_norm=section.flag("qk_normalization", True),
        norm=section.choice("norm_type", "rms_norm", ("layer_norm", "rms_norm")),
        final_norm=False,
    )


def _hf_vision(root: Section, section: Section) -> VisionConfig:
    root.choice("projector_hidden_act", "gelu", ("gelu",))
    root.choice("vision_feature_select_strategy", "default", ("default",))
    if not section.flag("use_absolute_position_embeddings", True):
        raise section.error("use_absolute_position_embeddings", "false is not supported")
    return _vision(
        section,
        selected=root.values.get("vision_feature_layer", -1),
        selected_name="vision_feature_layer",
        qkv_bias=section.flag("attention_bias", False),
        qk_norm=section.flag("use_qk_norm", False),
        norm=section.choice("norm_type", "layer_norm", ("layer_norm", "rms_norm")),
        final_norm=not section.flag("use_mean_pooling", True),
    )


def _vision(
    section: Section,
    *,
    selected: Any,
    selected_name: str,
    qkv_bias: bool,
    qk_norm: bool,
    norm: str,
    final_norm: bool,
) -> VisionConfig:
    section.choice("hidden_act", "gelu", ("gelu",))
    stored = section.integer("num_hidden_layers", high=MOST_PARTS)
    # Layer 0 is the embedding's output, so -1 means all layers and -2 all but the last.
    layers = selected if isinstance(selected, int) else -1 - stored
    layers = layers + stored + 1 if layers < 0 else layers
    if not 1 <= layers <= stored or isinstance(selected, bool):
        raise section.error("num_hidden_layers", f"is {stored}: no {selected_name} {selected!r}")
    hidden_size = section.integer("hidden_size")
    heads = section.integer("num_attention_heads")
    if hidden_size % heads:
        raise section.error("num_attention_heads", f"must divide hidden_size {hidden_size}")
    patch_size = section.side("patch_size", 14)
    return VisionConfig(
        hidden_size=hidden_size,
        layers=layers,
        stored_layers=stored,
        heads=heads,
        intermediate_size=section.integer("intermediate_size"),
        norm=norm,
        eps=section.number("layer_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        # The norm belongs to the last output only, not to the hidden states below it.
        final_norm=final_norm and selected == -1,
        channels=section.integer("num_channels", 3),
        patch_size=patch_size,
        grid=section.side("image_size", 448) // patch_size,
    )


def _geometry(
    folder: Path, root: Section, vision: Section, chat: bool
) -> tuple[int, dict[str, Any]]:
    """Tile side, and the other fields of VisionGeometry that do not depend on the patches."""
    if chat:
        tile_size = root.side("force_image_size", vision.side("image_size", 448))
        if not root.flag("dynamic_image_size", False):
            return tile_size, {"min_tiles": 1, "max_tiles": 1, "use_thumbnail": False}
        limits = _limits(root, "min_dynamic_patch", "max_dynamic_patch", default_max=6)
        # The original code normalises with ImageNet's statistics whatever the files say.
        return tile_size, limits | {"use_thumbnail": root.flag("use_thumbnail", False)}
    section = _image_processor(folder)
    if section is None:
        return vision.side("image_size", 448), {}
    # InternVLProcessor cuts tiles whatever crop_to_patches says, and always adds a thumbnail.
    fields = _limits(section, "min_patches", "max_patches", default_max=12)
    for name, key in (("mean", "image_mean"), ("std", "image_std")):
        if section.has(key):
            fields[name] = _channels(section, key)
    if not section.has("size"):
        return vision.side("image_size", 448), fields
    if isinstance(section.values["size"], int):
        return section.side("size"), fields
    size = section.section("size")
    height, width = size.integer("height"), size.integer("width")
    if height != width:
        raise section.error("size", "must be a square")
    return height, fields


def _image_processor(folder: Path) -> Section | None:
    """The image processor's settings: a file of its own, or inside processor_config.json."""
    if (folder / "processor_config.json").exists():
        processor = read_json(folder / "processor_config.json")
        if processor.has("image_processor"):
            return processor.section("image_processor")
    if (folder / "preprocessor_config.json").exists():
        return read_json(folder / "preprocessor_config.json")
    return None


def _limits(section: Section, low: str, high: str, *, default_max: int) -> dict[str, Any]:
    least, most = section.integer(low, 1), section.integer(high, default_max)
    if least > most:
        raise section.error(high, f"{most} is below {low} {least}")
    return {"min_tiles": least, "max_tiles": most}


def _channels(section: Section, key: str) -> tuple[float, ...]:
    value = section.values[key]
    if not (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    ):
        raise section.error(key, "must be three numbers")
    return tuple(float(x) for x in value)


def _tokens(folder: Path, root: Section, vocab_size: int) -> tuple[int, tuple[int, ...]]:
    """The ids of the picture's context token and of the tokens that end a turn."""
    path, look_up = _tokenizer(folder)

    def find(token: str) -> int | None:
        number = look_up(token)
        if number is not None and number >= vocab_size:
            raise CheckpointError(
                f"{path}: token {token} has id {number}, the model knows only {vocab_size}"
            )
        return number

    image, end_of_turn = find(IMAGE_TOKEN), find(END_OF_TURN)
    ends_of_text = [token for token in map(find, ENDS_OF_TEXT) if token is not None]
    if image is None or end_of_turn is None:
        raise CheckpointError(
            f"{path} has no token {IMAGE_TOKEN if image is None else END_OF_TURN}"
        )
    stated = root.values.get("image_token_id")
    if stated is not None and stated != image:
        logger.warning(
            "%s: image_token_id is %s, but %s has id %d in %s, which is used",
            root.name,
            stated,
            IMAGE_TOKEN,
            image,
            path.name,
        )
    return image, (end_of_turn, *ends_of_text[:1])


def _tokenizer(folder: Path) -> tuple[Path, Callable[[str], int | None]]:
    """A function from a token to its id, and the file that states it.

    An original checkpoint may hold a slow tokenizer only (vocab.json and merges.txt), which lists
    the tokens outside the merges in tokenizer_config.json, or an old one in added_tokens.json.
    """
    path, slow = folder / "tokenizer.json", folder / "tokenizer_config.json"
    old = folder / "added_tokens.json"
    if path.exists():
        try:
            return path, Tokenizer.from_file(str(path)).token_to_id
        except BaseException as error:  # the library raises bare Exception, and panics are none
            if isinstance(error, KeyboardInterrupt):
                raise
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    listed = read_json(slow).values if slow.exists() else {}
    if "added_tokens_decoder" not in listed and old.exists():
        return old, _whole(read_json(old)).get
    if not slow.exists():
        raise CheckpointError(f"{folder} has no tokenizer.json")
    try:
        added = listed["added_tokens_decoder"]
        ids = {str(token["content"]): int(number) for number, token in added.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{slow} does not list the added tokens") from None
    return slow, ids.get


def _whole(section: Section) -> dict[str, int]:
    return {name: section.integer(name) for name in section.values}


def _prompt_format(root: Section, chat: bool) -> PromptFormat:
    if not chat:
        return PromptFormat("hf", None, False)
    template = root.choice("template", "internvl2_5", tuple(TEMPLATES))
    sentence, after_turn = TEMPLATES[template]
    system = root.values.get("system_message")
    # The original code renders a null in the file as the word None; nobody can want that.
    return PromptFormat(template, sentence if system is None else str(system), True, after_turn)


def _dtype(root: Section, text: Section) -> str:
    for section in (root, text):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                value = str(section.values[key]).removeprefix("torch.")
                if value not in DTYPES:
                    raise section.error(key, f"is {value!r}; supported: {', '.join(DTYPES)}")
                return value
    return "bfloat16"
