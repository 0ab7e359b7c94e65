"""Engines alone: requests per second of what is tokenised and cut into tiles already.

    DIR/ours/bin/python -m benchmarks.gpu.offline CHECKPOINT FILE           ours
    DIR/vllm/bin/python -m benchmarks.gpu.offline CHECKPOINT FILE --vllm    vLLM's LLM class

Writes the figures of each case as JSON. All requests of a case are there when it begins, with as
many tokens for both; no text is made of answers. Ours is called in this process; vLLM's has one of
its own, and gets its pixels through shared memory while time is taken. Runs in two environments, so
each engine is imported by what starts it alone.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEXT, QUESTION = 1024, 64
"""Tokens of a prompt without a picture, and behind one (what begins a chat counted)."""
PICTURES = {1: (448, 448), 13: (1344, 1792)}
"""Tiles, and pixels across and down that make as many."""
CASES = {"text": (0, 256), "1 tile": (1, 128), "13 tiles": (13, 128)}
"""Tiles and tokens of the answer."""

Run = Callable[[int, int, int, int], float]
"""Seconds of requests with so many tiles and tokens, so many of them, of a seed."""


def measure(run: Run, cases: dict[str, tuple[int, int]], counts: Sequence[int]) -> dict[str, float]:
    """Requests per second by case."""
    found = {}
    for seed, (name, (tiles, tokens)) in enumerate(cases.items()):
        run(tiles, min(tokens, 8), max(counts), seed)  # what compiles does it now
        for number, count in enumerate(counts, 1):
            seconds = run(tiles, tokens, count, 1000 * number + seed)
            found[f"{name}, {count} at once"] = count / seconds
    return found


def requests_of(
    core: Any, geometry: Any, image_token: int, text: int = TEXT, question: int = QUESTION
) -> Run:
    """Those of our engine core, for tiles of ``geometry`` and prompts of so many tokens."""
    from benchmarks.gpu.harness import ask, shown

    def run(tiles: int, tokens: int, count: int, seed: int) -> float:
        requests = []
        for number in range(seed, seed + count):
            if tiles:
                picture = geometry, tiles, tokens, number, image_token, question
                requests.append(shown(f"{number}", *picture))
            else:
                words = np.random.default_rng(number).integers(0, 100, text).tolist()
                requests.append((ask(f"{number}", words, tokens), []))
        began = time.perf_counter()
        for request, pixels in requests:
            core.add(request, pixels)
        while (report := core.step()) is not None:
            assert not any(output.finish_reason == "error" for output in report.outputs)
        return time.perf_counter() - began  # the last step's tokens are here

    return run


def ours(checkpoint: Path, device: str) -> Run:
    """A core in this process that has loaded ``checkpoint``."""
    from engine.core import EngineCore
    from engine.runner import ModelRunner
    from model import load_config
    from wire.settings import EngineSettings

    config = load_config(checkpoint)
    settings = EngineSettings(model=str(checkpoint), device=device, enable_prefix_caching=False)
    runner = ModelRunner(settings)
    core = EngineCore(settings, runner, runner.ready())
    return requests_of(core, config.geometry, config.image_token_id)


def vllm(checkpoint: Path) -> Run:
    """vLLM's engine, which has a process of its own and gets what its renderer has made."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # which its shared memory wants
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        trust_remote_code=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.9,  # as ours
        limit_mm_per_prompt={"image": 1, "video": 0},
        mm_tensor_ipc="torch_shm",
    )

    def prepared(tiles: int, chance: np.random.Generator) -> Any:
        if not tiles:
            words = chance.integers(0, 100, TEXT).tolist()
            (found,) = llm._preprocess_cmpl([{"prompt_token_ids": words}])
            return found
        across, down = PICTURES[tiles]
        picture = Image.fromarray(chance.integers(0, 256, (down, across, 3), dtype=np.uint8))
        content = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": "1"}]
        (found,) = llm._preprocess_chat([[{"role": "user", "content": content}]])
        (shown,) = found["mm_placeholders"]["image"]
        behind = QUESTION - (len(found["prompt_token_ids"]) - shown.length)
        found["prompt_token_ids"] = [*found["prompt_token_ids"], *[5] * behind]
        return found

    def run(tiles: int, tokens: int, count: int, seed: int) -> float:
        chance = np.random.default_rng(seed)
        inputs = [prepared(tiles, chance) for _ in range(count)]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        for one in inputs:
            llm._add_request(one, sampling)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        return time.perf_counter() - began

    return run


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--device", default="cuda", help="ours; vLLM finds its own")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    given = parser.parse_args()
    run = vllm(given.checkpoint) if given.vllm else ours(given.checkpoint, given.device)
    cases = {name: (tiles, min(tokens, given.tokens)) for name, (tiles, tokens) in CASES.items()}
    given.out.write_text(json.dumps(measure(run, cases, given.counts)), encoding="utf-8")


if __name__ == "__main__":
    main()
