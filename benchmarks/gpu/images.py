"""From a file's bytes to embeddings: decode workers on the host, the encoder on the device."""

import asyncio
import base64
import dataclasses
import os
import time

import torch

from benchmarks.gpu.harness import Bench, make_model
from benchmarks.media import photograph, processor_time
from preprocessing import MediaPart, MediaPipeline
from preprocessing.media import TiledMedia
from tests.checkpoints import INTERNVL3_1B, Shape
from wire.settings import MediaSettings


def images(bench: Bench) -> None:
    """10: JPEGs of 12 megapixels as 13 tiles and as one, alone and many at once. Only with one tile
    can a hundred a second be asked for: 13 of 0.738 TFLOP take 12 ms of 790 TFLOP/s."""
    shape = bench.pick(dataclasses.replace(INTERNVL3_1B, layers=1), Shape())
    model = make_model(bench, shape)
    geometry, many = model.config.geometry, bench.pick(64, 2)
    encoded = photograph(*bench.pick((4032, 3024), (64, 48)))
    url = f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
    workers = bench.pick(max(2, (os.cpu_count() or 2) // 2), 1)
    media = MediaPipeline(MediaSettings(media_workers=workers, tile_cache_bytes=0))

    async def embed(number: int, most: int | None) -> int:
        # A salt of its own, or those that ask for one picture would wait for each other.
        part = MediaPart(url, "picture", most, salt=number.to_bytes(4))
        loaded = await media.load(part)
        assert isinstance(loaded, TiledMedia)
        tiles = torch.frombuffer(bytearray(loaded.tiles), dtype=torch.uint8)
        side = geometry.tile_size
        with torch.inference_mode():
            model.encode_tiles(tiles.view(loaded.count, 3, side, side))
        return loaded.count

    async def all_at_once(count: int, most: int | None) -> list[int]:
        return await asyncio.gather(*(embed(number, most) for number in range(count)))

    with asyncio.Runner() as runner:
        runner.run(media.start(geometry))
        try:
            for most in (None, 1):
                for count in (1, many):
                    found = runner.run(all_at_once(count, most))  # once to begin with
                    bench.synchronize()
                    name = f"{count} at once, {found[0]} tiles"
                    began, used = time.perf_counter(), processor_time(media.worker_pids)
                    runner.run(all_at_once(count, most))
                    bench.synchronize()
                    took = time.perf_counter() - began
                    used = processor_time(media.worker_pids) - used
                    least = 100 if most and count > 1 else None
                    bench.record(name, count / took, "pictures/s", least=least)
                    bench.record(name, used / count * 1e3, "ms of CPU", most=60)
        finally:
            runner.run(media.close())
