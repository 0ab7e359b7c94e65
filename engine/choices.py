"""What an engine computes on, and in, where its settings leave that open."""

import logging
import os

import torch

from model import ModelConfig, count_parameters
from wire.settings import EngineSettings, SettingError

logger = logging.getLogger(__name__)

# Up to this many parameters the CPU computes in fp32: exact, and no slower at that size.
_SMALL = 100_000_000


def choose_device(settings: EngineSettings) -> str:
    """Its type. Raises ValueError."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device is cuda, but torch finds no CUDA device")
    return settings.device


def default_threads(config: ModelConfig) -> int:
    """One per core; but a small model's operations are shorter than waking a second thread."""
    return 1 if count_parameters(config) <= _SMALL else len(os.sched_getaffinity(0))


def choose_dtype(
    settings: EngineSettings, config: ModelConfig, device: torch.device
) -> torch.dtype:
    """What a checkpoint is computed in there."""
    name = settings.dtype
    if name == "auto":
        small = device.type == "cpu" and count_parameters(config) <= _SMALL
        name = "float32" if small else config.dtype
        if settings.quantization == "int8" and device.type == "cpu":
            name = "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def choose_max_model_len(settings: EngineSettings, config: ModelConfig) -> int:
    """Tokens of the longest sequence; the memory may have room for fewer."""
    if settings.max_model_len > config.max_model_len:
        logger.info(
            "max_model_len=%d: beyond %d tokens, the model's positions, are only prompts whose "
            "pictures take fewer positions than tokens (v2pe_delta)",
            settings.max_model_len,
            config.max_model_len,
        )
    return settings.max_model_len or config.max_model_len
