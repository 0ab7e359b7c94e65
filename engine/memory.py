"""How many blocks the KV cache gets.

Asked once, by the runner, when the weights are loaded. An explicit setting wins; otherwise the
cache takes a share of what is free, and never more than full rows could use.
"""

import logging
from pathlib import Path

import torch

from model import InternVL, ModelConfig
from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

_CPU_MOST = 2 << 30
_CPU_SHARE = 4
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def kv_blocks(
    settings: EngineSettings, model: InternVL, attention: AttentionBackend, max_model_len: int
) -> int:
    """Blocks of the cache. Raises ValueError if there is no room for a single one."""
    if settings.num_kv_blocks:
        return settings.num_kv_blocks
    size = KVCache.block_bytes(model.config.text, settings.block_size, model.dtype)
    useful = settings.max_num_seqs * -(-max_model_len // settings.block_size)
    if settings.kv_cache_memory:
        memory = settings.kv_cache_memory
    elif model.device.type == "cuda":
        memory = _free_on_gpu(settings, model, attention)
    else:
        memory = min(_CPU_MOST, free_memory() // _CPU_SHARE)
    blocks = min(useful, memory // size)
    if blocks < 1:
        raise ValueError(
            f"no memory for the KV cache: a block takes {size} bytes, {max(memory, 0)} are there"
        )
    return blocks


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping, the container's limit included."""
    values = dict(line.split(":", 1) for line in _MEMINFO.read_text("ascii").splitlines())
    free = int(values["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text("ascii"))
        used = int((_CGROUP / "memory.current").read_text("ascii"))
    except (OSError, ValueError):  # not in a container, or no limit ("max")
        return free
    return min(free, max(0, limit - used))


def _free_on_gpu(settings: EngineSettings, model: InternVL, attention: AttentionBackend) -> int:
    """What the share of the GPU leaves beside weights, activations and encoded pictures."""
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    _run_largest(settings, model, attention)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    share = int(total * settings.gpu_memory_utilization)
    memory = share - others - peak - settings.encoder_cache_bytes
    logger.info("memory total=%d share=%d others=%d peak=%d", total, share, others, peak)
    return memory


@torch.inference_mode()
def _run_largest(settings: EngineSettings, model: InternVL, attention: AttentionBackend) -> None:
    """The most memory a step can take: all tiles at once, then a prompt of all tokens."""
    config: ModelConfig = model.config
    side, device = config.geometry.tile_size, model.device
    tiles = min(16, settings.max_num_encoder_tiles)
    model.encode_tiles(torch.zeros((tiles, 3, side, side), dtype=torch.uint8, device=device))
    count, size = settings.max_num_batched_tokens, settings.block_size
    blocks = -(-count // size)
    kv = KVCache(config.text, blocks=blocks, block_size=size, device=device, dtype=model.dtype)
    positions = torch.arange(count, device=device)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lengths=torch.tensor([count], dtype=torch.int32, device=device),
        slots=positions,
        block_tables=torch.arange(blocks, device=device)[None],
        queries=(count,),
        contexts=(count,),
    )
    hidden = model(model.embed(torch.zeros_like(positions)), positions, batch, kv, attention)
    model.logits(hidden[: settings.max_num_seqs])
