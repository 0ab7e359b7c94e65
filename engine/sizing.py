"""What a checkpoint takes of a device's memory, from its config.json alone: no weights are read,
and the device need not be here. ``internvl plan`` prints it. Of several devices, which compute one
model together, all of a stage take as much as its first (``model.parallel``), and the stage with
the least room is the one that counts (``model.stages``).

    python -m engine.sizing MEMORY_IN_BYTES SETTINGS_AS_JSON

Weights and cache are exact. What a step takes is an estimate of its largest tensors; the server
itself measures it when it starts.
"""

import contextlib
import dataclasses
import signal
import sys
from pathlib import Path

import msgspec
import torch

from engine.memory import encoded_pictures
from engine.speculation import max_draws
from model import CheckpointError, InternVL, ModelConfig, load_config, skeleton
from model.awq import keep_packed
from model.kv_cache import KVCache
from model.ops import Ops
from model.parallel import possible_sizes, share
from model.schema import TextConfig
from model.stages import part_of, share_out, weight_sizes
from wire.settings import EngineSettings

GIB = 1 << 30
_FP32 = 4
# Tensors as large as the logits that sampling holds at once: themselves, their sorted values and
# places (int64), shares and their sums.
_OF_LOGITS = 6


@dataclasses.dataclass(frozen=True)
class Sizing:
    """Bytes of a device, but for ``parameters`` of the whole model (by part), ``context`` (tokens)
    and ``tokens`` that fit in the cache.

    ``config`` tells of the whole model, ``text`` of the part that each of ``devices`` has of its
    decoder; ``layers`` are those of its stage.
    """

    config: ModelConfig
    text: TextConfig
    devices: int
    stages: int
    layers: range
    dtype: str
    parameters: dict[str, int]
    weights: int
    token: int  # of the KV cache
    step: int
    pictures: int  # encoded ones that are kept
    usable: int
    context: int

    @property
    def cache(self) -> int:
        """What is left for the KV cache; less than nothing where the model does not fit."""
        return self.usable - self.weights - self.step - self.pictures

    @property
    def tokens(self) -> int:
        """That the cache holds."""
        return max(self.cache, 0) // self.token

    @property
    def picture_tokens(self) -> int:
        """Of the largest picture, with the marks before and behind it."""
        geometry = self.config.geometry
        tiles = geometry.tile_limit + (geometry.use_thumbnail and geometry.tile_limit > 1)
        return tiles * geometry.tokens_per_tile + 2

    @property
    def fits(self) -> bool:
        """Whether a sequence of full length can be computed."""
        return self.tokens >= self.context


def size(config: ModelConfig, settings: EngineSettings, memory: int) -> Sizing:
    """What a model takes of a device with so many bytes of memory.

    Raises ValueError where it cannot be divided among so many devices, and CheckpointError where
    four bits that are to be kept cannot, or are not there.
    """
    config = dataclasses.replace(config, geometry=config.geometry.limited(settings.max_tiles))
    dtype = getattr(torch, config.dtype if settings.dtype == "auto" else settings.dtype)
    # Native ones have an output matrix whatever they say: the flag is its class's default.
    tied = config.text.tied and config.format == "chat"
    devices = settings.tensor_parallel_size
    text = share(config.text, devices)
    model = skeleton(config, tied=tied, text=text)
    parameters = _parameters(skeleton(config, tied=tied))
    if settings.quantization == "awq":
        keep_packed(model, config.awq)
    rest, each = weight_sizes(model, dtype.itemsize, settings.quantization)
    found = [
        Sizing(
            config=config,
            text=part_of(text, layers),
            devices=devices,
            stages=settings.pipeline_parallel_size,
            layers=layers,
            dtype=str(dtype).removeprefix("torch."),
            parameters=parameters,
            weights=sum(each[layers.start : layers.stop]) + (rest if layers.start == 0 else 0),
            token=KVCache.block_bytes(part_of(text, layers), 1, dtype),
            step=_step(config, text, settings, dtype.itemsize, first=layers.start == 0),
            pictures=encoded_pictures(settings, config, dtype) if layers.start == 0 else 0,
            usable=int(memory * settings.gpu_memory_utilization),
            context=settings.max_model_len or config.max_model_len,
        )
        for layers in share_out(rest, each, settings.pipeline_parallel_size)
    ]
    return min(found, key=lambda stage: stage.cache / stage.token)


def _parameters(model: InternVL) -> dict[str, int]:
    parts = {
        "encoder": model.vision,
        "projector": model.projector,
        "language model": model.decoder,
    }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _step(
    config: ModelConfig, text: TextConfig, settings: EngineSettings, size: int, *, first: bool
) -> int:
    """Encoding, layers and sampling come one behind the other: the most that one of them takes. All
    but layers is the first stage's alone."""
    vision = config.vision
    wide = max(2 * (text.heads + 2 * text.kv_heads) * text.head_dim, _mlp_width(text))
    layers = settings.max_num_batched_tokens * (3 * text.hidden_size + wide) * size
    if not first:
        return layers
    tiles = settings.encoder_chunk_tiles or Ops().tiles_at_once(torch.device("cuda"))
    patches = tiles * (config.tile_grid**2 + 1)
    inner = max(4 * vision.hidden_size, vision.intermediate_size)
    encoder = patches * (3 * vision.hidden_size + inner) * size
    # One rank draws from the logits of all.
    sampling = max_draws(settings, "cuda") * config.vocab_size * _FP32 * _OF_LOGITS
    return max(layers, encoder, sampling)


def _mlp_width(text: TextConfig) -> int:
    """Numbers of a token that an MLP has at once: gates, what they gate, and their product; of a
    mixture those of all chosen experts (``model.triton.experts``), or that product and results,
    which ranks do not share."""
    dense, experts = 3 * text.intermediate_size, text.experts
    if experts is None:
        return dense
    inner = experts.intermediate_size
    mixed = experts.chosen * (inner + max(2 * inner, text.hidden_size))
    return max(mixed, dense) if experts.dense else mixed


def devices_needed(config: ModelConfig, settings: EngineSettings, memory: int) -> int | None:
    """How many devices with so much memory each are enough; None: it cannot be divided so far."""
    for count in possible_sizes(config.text):
        if count > settings.tensor_parallel_size:
            several = dataclasses.replace(settings, tensor_parallel_size=count)
            with contextlib.suppress(CheckpointError):  # groups of four bits that would be cut
                if size(config, several, memory).fits:
                    return count
    return None


def describe(sizing: Sizing, memory: int) -> list[str]:
    """Lines for people."""
    config, text, part = sizing.config, sizing.config.text, sizing.text
    parts = ", ".join(f"{name} {count / 1e9:.3f}" for name, count in sizing.parameters.items())
    format_name = "original" if config.format == "chat" else "native"
    context = sizing.context
    lines = [
        f"{format_name} format, {text.backbone}, {text.layers} layers of {text.hidden_size}; "
        f"encoder {config.vision.layers} layers of {config.vision.hidden_size}",
        f"parameters        {sum(sizing.parameters.values()) / 1e9:.3f} billion ({parts})",
        f"weights           {_gib(sizing.weights)} in {sizing.dtype}",
        f"a step            {_gib(sizing.step)} about; measured when the server starts",
        f"encoded pictures  {_gib(sizing.pictures)}",
        f"KV cache          {_gib(max(sizing.cache, 0))} of {_gib(memory)}: {sizing.tokens} tokens "
        f"of {sizing.token} bytes, {sizing.tokens / context:.1f} sequences of {context}",
        f"a large picture   {sizing.picture_tokens} tokens: {context // sizing.picture_tokens} in "
        "a sequence",
    ]
    if sizing.devices > 1:
        each = (
            f"on each of {sizing.devices:<7}{part.heads} of {text.heads} query heads, "
            f"{part.kv_heads} of {text.kv_heads} key heads, the whole encoder; bytes are of one"
        )
        lines.insert(2, each)
    if sizing.stages > 1:
        also = ", encoder, embedding and head" if sizing.layers.start == 0 else ""
        stage = f"{len(sizing.layers)} of {text.layers} layers{also}; bytes are of one device of it"
        lines.insert(2, f"fullest stage     {stage}")
    if sizing.fits:
        return [*lines, "It fits."]
    if sizing.cache < sizing.token:
        # Of the device's: only a share of them would be used.
        missing = (sizing.token - sizing.cache) * memory // max(sizing.usable, 1)
        return [*lines, f"It does not fit: at least {_gib(missing)} are missing."]
    return [
        *lines,
        f"It does not fit with a context of {context} tokens; with --max-model-len "
        f"{sizing.tokens} it does.",
    ]


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def main() -> int:
    """Print it; 1 if the model does not fit, 2 if the checkpoint cannot be served."""
    memory, settings = int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=EngineSettings)
    try:
        config = load_config(Path(settings.model))
        sizing = size(config, settings, memory)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(describe(sizing, memory)))
    if not sizing.fits and (enough := devices_needed(config, settings, memory)):
        stages = f" x {sizing.stages} stages" if sizing.stages > 1 else ""
        print(f"On {enough}{stages} such devices it does (--tensor-parallel-size {enough}).")
    return 0 if sizing.fits else 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may have read enough
    sys.exit(main())
