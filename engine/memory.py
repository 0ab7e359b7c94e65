"""What the largest step takes, and how many blocks are left for the KV cache.

Asked by the runner, once, when the weights are loaded. The largest step is not computed from
formulas but run: ``largest_step`` is a plan like any other. An explicit size of the cache wins,
but is refused where it cannot fit; otherwise the cache takes what a share of the memory leaves
beside everything else, and never more than full rows could use.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.plan import EncodeItem, NewRow, StepPlan, Work
from engine.speculation import max_draws
from model import InternVL, ModelConfig
from model.kv_cache import KVCache
from wire.geometry import VisionGeometry
from wire.messages import EngineRequest, VisionItem
from wire.sampling import MAX_LOGPROBS, SamplingParams
from wire.settings import EngineSettings, SettingError

logger = logging.getLogger(__name__)

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
# Pieces that the C library gives back when they are freed. Real steps were seen to take a half more
# than the profile of the same steps where it learnt for itself what to keep.
LARGE = 8 << 20
# What it may hold beside what is in use: its top (see wire.heap) and its holes.
_HELD = 4 * LARGE
# Layers take the same memory one after the other: two show the peak of any number.
_LAYERS = 2
# As many ids as a request may name.
_NAMED = 1024


@contextlib.contextmanager
def shallow(model: InternVL) -> Iterator[None]:
    """Leave out all but two layers of encoder and decoder, and the first of each other kind, so
    that a step takes little time."""
    parts: list[Any] = [model.decoder, *([model.vision] if model.group.stage == 0 else [])]
    whole = [part.layers for part in parts]
    for part, layers in zip(parts, whole, strict=True):
        part.layers = _few(layers)
    try:
        yield
    finally:
        for part, layers in zip(parts, whole, strict=True):
            part.layers = layers


def _few(layers: nn.ModuleList) -> nn.ModuleList:
    kinds: dict[frozenset[type], nn.Module] = {}
    for layer in layers:
        kinds.setdefault(frozenset(map(type, layer.modules())), layer)
    first = list(layers)[:_LAYERS]
    return nn.ModuleList([*first, *(one for one in kinds.values() if one not in first)])


def largest_step(
    settings: EngineSettings,
    geometry: VisionGeometry,
    max_model_len: int,
    vocab_size: int,
    device: torch.device,
) -> tuple[EngineRequest, list[bytes], StepPlan]:
    """The step that takes the most memory; before it, the request must be uploaded.

    All tiles are encoded. One row ends a prompt of full length with all tokens that the others
    leave, which generate at full length; every row draws, with everything a sampler can do. There
    are as many as a step may draw for, tokens on trial counted. All name the same blocks, as many
    as one row of full length has.
    """
    most = geometry.tile_limit + 1
    pictures, left = [], settings.max_num_encoder_tiles
    while left:
        pictures.append(min(most, left))
        left -= pictures[-1]
    items = [VisionItem(b"%d" % i, 0, 0, count, i) for i, count in enumerate(pictures)]
    rows = min(max_draws(settings, device.type), settings.max_num_batched_tokens)
    ids, blocks = [0] * max_model_len, list(range(-(-max_model_len // settings.block_size)))
    sampling = SamplingParams(
        # So flat that top_p cannot be found among the likeliest tokens alone.
        temperature=2.0,
        top_p=1 - 1e-9,
        top_k=vocab_size,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logit_bias=tuple((token, 1.0) for token in range(min(_NAMED, vocab_size))),
        logprobs=MAX_LOGPROBS,
        prompt_logprobs=MAX_LOGPROBS,
    )
    chunk = min(max_model_len, settings.max_num_batched_tokens - rows + 1)
    work = []
    for index in range(rows):
        count = 1 if index else chunk
        # Scoring ends before the last token of a prompt, which nothing follows.
        score = index == 0 and count > 1
        work.append(Work(f"{index}", max_model_len - count, count, [], True, score))
    plan = StepPlan(
        step=0,
        new_rows=[
            NewRow(
                w.id, ids, max_model_len if w.score else max_model_len // 2, sampling, [], blocks
            )
            for w in work
        ],
        work=work,
        encode=[EncodeItem(item.digest, "0", 0, item.tiles) for item in items],
        drop=[],
        removed=[],
    )
    buffers = [bytes(count * geometry.tile_bytes) for count in pictures]
    return EngineRequest("0", ids, sampling, items), buffers, plan


def measure(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes of the device that ``run`` takes at its peak, over what is held when it has ended.

    On the CPU it is resident memory that counts, libraries' own included.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # then the peak since the start counts, which is no less
        (_PROC / "self/clear_refs").write_text("5", "ascii")
    run()
    status = _table(_PROC / "self/status")
    return status["VmHWM"] - status["VmRSS"]


def encoded_pictures(settings: EngineSettings, config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that encoded pictures may take: the largest one is encoded even if it is larger than
    the budget."""
    token = config.text.hidden_size * dtype.itemsize
    largest = (config.geometry.tile_limit + 1) * config.geometry.tokens_per_tile * token
    return max(settings.encoder_cache_bytes, largest)


def kv_blocks(settings: EngineSettings, model: InternVL, max_model_len: int, step: int) -> int:
    """Blocks of the cache beside a step of ``step`` bytes, as ``measure`` found it: as many as the
    rank with the least memory can have.

    Raises ValueError if there is no room for a single one, or not for as many as were asked for.
    """
    geometry = model.config.geometry
    sees = model.group.stage == 0  # or has nothing to do with pictures
    rest = step + (encoded_pictures(settings, model.config, model.dtype) if sees else 0)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
        ours = int(total * settings.gpu_memory_utilization) - (total - free)
    else:
        # Of what is free, not of all: this memory belongs to other programs too.
        free = free_memory() // model.group.neighbours
        ours = int(free * settings.cpu_memory_utilization)
        context = max_model_len // geometry.tokens_per_tile * geometry.tile_bytes
        rest += (max(settings.request_tile_bytes, context) if sees else 0) + _HELD
        # Cosine and sine of every position, fp32, which model.single keeps.
        rest += max_model_len * model.text.head_dim * 4
    size = KVCache.block_bytes(model.text, settings.block_size, model.dtype)
    useful = settings.max_num_seqs * -(-max_model_len // settings.block_size)
    explicit = settings.num_kv_blocks * size or settings.kv_cache_memory
    memory = explicit or ours - rest
    blocks = settings.num_kv_blocks or min(useful, memory // size)
    logger.debug(
        "memory free=%d ours=%d step=%d beside_cache=%d block=%d blocks=%d",
        free, ours, step, rest, size, blocks,
    )  # fmt: skip
    if blocks < 1:
        raise SettingError(
            f"no memory for the KV cache: a block takes {size} bytes, {max(memory, 0)} are there "
            f"(docs/operations.md says what else takes {rest}, and which settings bound it)"
        )
    if explicit and blocks * size + rest > free:
        raise SettingError(
            f"a KV cache of {blocks} blocks takes {blocks * size} bytes; with {rest} for the "
            f"largest step and for pictures that is more than the {free} bytes that are free"
        )
    return model.group.least(blocks)


def within(blocks: int, settings: EngineSettings, max_model_len: int) -> int:
    """``max_model_len``, or as much of it as fits in so many blocks."""
    capacity = blocks * settings.block_size
    if capacity < max_model_len:
        logger.warning(
            "max_model_len=%d reduced to the KV cache's %d tokens", max_model_len, capacity
        )
    return min(capacity, max_model_len)


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping; a container's limit counts too."""
    machine = _table(_PROC / "meminfo")
    free, total = machine["MemAvailable"], machine["MemTotal"]
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int((_CGROUP / limit_file).read_text("ascii"))
            used = int((_CGROUP / used_file).read_text("ascii"))
            stat = ((_CGROUP / used_file).parent / "memory.stat").read_text("ascii")
        except (OSError, ValueError):  # not in a container, or no limit ("max")
            continue
        # Files that were read count as used until somebody else needs the room.
        rows = dict(line.split() for line in stat.splitlines())
        used -= int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
        if limit < total:
            free = min(free, max(0, limit - used))
    return free


def _table(file: Path) -> dict[str, int]:
    """The sizes that a file of /proc lists, in bytes."""
    rows = (line.partition(":") for line in file.read_text("ascii").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in rows if value.endswith(" kB")}
