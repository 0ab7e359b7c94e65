"""Drives a real engine with the worst traffic that its settings admit, and says what it took.

``python -m tests.process.worst_traffic FOLDER JSON`` writes JSON, in bytes: ``peak``,
what the process took at most beyond what it held when it was ready; ``step``, what was profiled;
``cache``, what keys and values may take; ``tiles``, all tiles that were sent.
"""

import json
import sys
from pathlib import Path
from typing import Any

import engine.memory
import engine.runner
from engine.core import EngineCore
from engine.memory import measure
from engine.runner import ModelRunner
from model.kv_cache import KVCache
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

# Tokens of an answer: the first is not over when the last begins.
ANSWER = 14


def main(folder: str, values: dict[str, Any]) -> dict[str, int]:
    settings = EngineSettings(model=folder, device="cpu", threads=1, **values)
    profiled: list[int] = []

    def remember(*arguments: Any) -> int:
        profiled.append(measure(*arguments))
        return profiled[-1]

    engine.runner.measure = remember
    runner = ModelRunner(settings)
    ready = runner.ready()
    core = EngineCore(settings, runner, ready)
    model = runner._model
    block = KVCache.block_bytes(model.config.text, settings.block_size, model.dtype)
    before = resident()
    most = tiles = 0

    def drive(indices: range) -> None:
        nonlocal most, tiles
        for index in indices:
            asked, buffers = request(ready, index)
            tiles += sum(map(len, buffers))
            core.add(asked, buffers)
        while (report := core.step()) is not None:
            most = max(most, report.stats.running)
            assert not any(output.error for output in report.outputs)

    def run() -> None:
        drive(range(1))  # leaves the common beginning in the cache
        drive(range(1, 1 + settings.max_num_seqs))

    peak = measure(model.device, run) + resident() - before
    assert most == settings.max_num_seqs, "they were not all there at once"
    cache = ready.blocks_total * block
    return {"peak": peak, "step": profiled[0], "cache": cache, "tiles": tiles}


def resident() -> int:
    return engine.memory._table(Path("/proc/self/status"))["VmRSS"]


def request(ready: Any, index: int) -> tuple[EngineRequest, list[bytearray]]:
    """Full length, a picture of the most tiles, and everything a sampler can do.

    All begin alike, so that all generate at once although the cache holds few whole contexts.
    """
    geometry = ready.geometry
    tiles = geometry.max_tiles + 1
    length = tiles * geometry.tokens_per_tile
    offset = ready.max_model_len - ANSWER - length - 1
    item = VisionItem(b"%d" % index, offset, length, tiles, 0)
    sampling = SamplingParams(
        temperature=1.0,
        top_p=0.9,
        top_k=ready.vocab_size,
        min_p=0.01,
        seed=index,
        max_tokens=ANSWER,
        repetition_penalty=1.2,
        presence_penalty=0.2,
        frequency_penalty=0.2,
        logit_bias=tuple((token, 1.0) for token in range(1000)),
        logprobs=20,
    )
    prompt = [1] * (offset + length + 1)
    buffer = bytearray([index % 256]) * (tiles * geometry.tile_bytes)
    return EngineRequest(f"{index}", prompt, sampling, [item]), [buffer]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
