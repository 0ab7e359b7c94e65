"""The shape of a model as frozen dataclasses, and the reader of config.json values.

Everything below ``model`` is built from these types; ``model.config`` fills them from either
checkpoint format. No value here comes from a model's name, only from its files.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wire.errors import Unservable
from wire.geometry import PromptFormat, VisionGeometry

DTYPES = ("float32", "bfloat16", "float16")
# Of any size; positions are exact in fp32 up to here.
_MOST = 1 << 24
MOST_PARTS = 512
"""Layers, and experts of a layer: each is built before its weights can be missed."""


class CheckpointError(Unservable):
    """The checkpoint folder cannot be served. The message is for the operator."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """InternViT. ``layers`` of ``stored_layers`` are run: those up to the selected one."""

    hidden_size: int
    layers: int
    stored_layers: int
    heads: int
    intermediate_size: int
    norm: str  # "layer_norm" or "rms_norm"
    eps: float
    qkv_bias: bool
    qk_norm: bool
    final_norm: bool
    channels: int
    patch_size: int
    grid: int
    """Patches per side that the stored position embedding is for."""


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Pixel shuffle and MLP. ``factor`` patches per side become one token."""

    factor: int
    version: str  # "v2", or "v1": the token grid comes out transposed
    input_size: int
    hidden_size: int
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of the MLP of every layer that is not in ``dense``.

    ``chosen`` of ``count`` experts, each ``intermediate_size`` wide, answer a token; with
    ``normalised`` their shares add up to 1.
    """

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool
    dense: frozenset[int]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. ``tied`` is what a missing lm_head means; a stored lm_head always wins.

    With ``qk_norm`` the queries and keys of each head are normed before they are turned.
    """

    backbone: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    eps: float
    rope_theta: float
    max_positions: int
    qkv_bias: bool
    out_bias: bool
    tied: bool
    qk_norm: bool = False
    experts: ExpertsConfig | None = None


@dataclasses.dataclass(frozen=True)
class AwqConfig:
    """Weights in four bits (``model.awq``); ``group`` inputs of an output share a scale and a
    zero."""

    group: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything a checkpoint folder says except its weights.

    ``format`` is "chat" (original) or "hf"; ``dtype`` the type the weights were saved in;
    ``tile_grid`` the patches per side of a served tile.
    """

    format: str
    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    geometry: VisionGeometry
    prompt_format: PromptFormat
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    awq: AwqConfig | None = None

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens; dynamic-NTK scaling has no effect up to here."""
        return self.text.max_positions

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.text.vocab_size

    @property
    def tile_grid(self) -> int:
        """Patches per side of a tile."""
        return self.geometry.tile_size // self.vision.patch_size


class Section:
    """One object of a JSON file. Reads typed values; every complaint names file and key."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self.name = name

    def error(self, key: str, problem: str) -> CheckpointError:
        """The error to raise about ``key``."""
        return CheckpointError(f"{self.name}: {key} {problem}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def section(self, key: str) -> "Section":
        """The object under ``key``, which must exist."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "is missing" if value is None else "must be an object")
        return Section(value, f"{self.name}: {key}")

    def integer(self, key: str, default: int | None = None, *, high: int = _MOST) -> int:
        """A whole number from 1 to ``high``."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.error(key, f"must be a whole number from 1 to {high}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {value!r}")
        if not 0 < value <= sys.float_info.max:
            raise self.error(key, f"must be a finite number above zero, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One of the ``known`` words."""
        value = self._get(key, default)
        if value not in known:
            raise self.error(key, f"is {value!r}; supported: {', '.join(known)}")
        return str(value)

    def side(self, key: str, default: int | None = None) -> int:
        """The side of a square, written as a number or as [height, width]."""
        value = self._get(key, default)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(key, f"must be a square, got {value!r}")
            return Section({key: value[0]}, self.name).integer(key)
        return self.integer(key, default)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing")
        return value


def read_json(path: Path) -> Section:
    """Read a file that holds one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return Section(values, str(path))
