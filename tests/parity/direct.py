"""The model called directly, without an engine, and prompts to call it with."""

from pathlib import Path

import torch
from torch import Tensor

from model import InternVL, build_model, load_config
from model.attention import choose
from model.attention.base import AttentionBatch
from model.kv_cache import KVCache
from tests.checkpoints import IMAGE_TOKEN, Shape


def run(
    model: InternVL, ids: list[int], tiles: Tensor | None, image_token: int = IMAGE_TOKEN
) -> Tensor:
    """fp32 logits ``[tokens, vocab]`` of one prompt, in one pass."""
    count, size = len(ids), 16
    attention = choose("sdpa", model.config.text, model.device, model.dtype, size)
    blocks = -(-count // size)
    kv = KVCache(
        model.config.text, blocks=blocks, block_size=size, device=model.device, dtype=model.dtype
    )
    positions = torch.arange(count)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lengths=torch.tensor([count], dtype=torch.int32),
        slots=positions,
        block_tables=torch.arange(blocks)[None],
        queries=(count,),
        contexts=(count,),
    )
    with torch.inference_mode():
        embeddings = model.embed(torch.tensor(ids))
        if tiles is not None:
            embeddings[torch.tensor(ids) == image_token] = model.encode_tiles(tiles).flatten(0, 1)
        return model.logits(model(embeddings, positions, batch, kv, attention))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> InternVL:
    return build_model(load_config(folder), folder, device=torch.device("cpu"), dtype=dtype)


def prompt(shape: Shape, tiles: list[int], seed: int = 0) -> tuple[list[int], Tensor | None]:
    """A prompt with a picture of so many tiles each, text around them, and all tiles."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    ids = text(9)
    for count in tiles:
        ids += [IMAGE_TOKEN] * (count * shape.tokens_per_tile) + text(4)
    side = shape.tile_size
    pixels = torch.randint(0, 256, (sum(tiles), 3, side, side), generator=generator)
    return ids, pixels.to(torch.uint8) if tiles else None
