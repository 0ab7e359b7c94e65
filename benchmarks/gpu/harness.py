"""Times, marks and results of the parts, and models of a given shape with random weights."""

import contextlib
import dataclasses
import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine.runner
from engine.core import EngineCore
from engine.runner import ModelRunner
from model import ModelConfig, load_config, skeleton
from model.internvl import InternVL
from model.ops import choose
from model.quantize import quantize_layer, quantizer
from tests.checkpoints import IMAGE_TOKEN, INTERNVL3, Shape, make_checkpoint
from wire.geometry import VisionGeometry
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings


@dataclasses.dataclass
class Bench:
    """One visit: where it runs, and what it found. ``dry`` is for tiny shapes on any machine."""

    device: torch.device
    dry: bool
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    part: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def models(self) -> dict[str, Shape]:
        if self.dry:
            return {"tiny": Shape()}
        return {name: INTERNVL3[name] for name in ("8B", "1B")}

    def pick(self, usual: Any, dry: Any) -> Any:
        return dry if self.dry else usual

    def record(
        self,
        case: str,
        value: float,
        unit: str,
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """A figure, and whether it is within its mark; marks are judged on a GPU only."""
        entry: dict[str, Any] = {"part": self.part, "case": case, "value": value, "unit": unit}
        if least is not None or most is not None:
            entry["mark"] = f"≥ {least}" if least is not None else f"≤ {most}"
            if not self.dry:
                low = least is None or value >= least
                entry["passed"] = low and (most is None or value <= most)
        self.results.append(entry)

    def check(self, case: str, passed: bool) -> None:
        """Something that is right or wrong wherever it runs."""
        self.results.append({"part": self.part, "case": case, "passed": passed})

    def skip(self, case: str, reason: str) -> None:
        self.results.append({"part": self.part, "case": case, "skipped": reason})

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What goes wrong here is noted, and the rest goes on."""
        try:
            yield
        except Exception as error:
            print(traceback.format_exc())
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            self.results.append({"part": self.part, "case": name, "error": text})
        finally:
            if self.device.type == "cuda":
                gc.collect()  # what failed is a part of cycles
                torch.cuda.empty_cache()

    def seconds(self, function: Callable[[], Any], repeat: int = 20) -> float:
        """One call's time on the device: the median of five rounds of ``repeat`` calls."""
        function()
        if self.device.type != "cuda":
            began = time.perf_counter()
            function()
            return time.perf_counter() - began
        rounds = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                function()
            end.record()
            end.synchronize()
            rounds.append(start.elapsed_time(end) / 1000 / repeat)
        return statistics.median(rounds)

    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        source = torch.empty(self.pick(1 << 31, 1 << 16), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_model(
    config: ModelConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    progress: Any = None,
    group: Any = None,
) -> InternVL:
    """In place of ``build_model``: seeded weights, made on the device; one rank alone."""
    model = skeleton(config, tied=config.text.tied).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "scale" in name:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    model.parameter_count = sum(parameter.numel() for parameter in model.parameters())
    model.vision.fit(config.tile_grid)
    model.vision.fold()
    if (quantized := quantizer(model.decoder.layers, quantization, device)) is not None:
        for name, _ in list(model.decoder.named_modules()):
            quantize_layer(model.decoder, name, quantized)
    model.ops = choose(device, dtype)
    model.ops.prepare(list(model.modules()), model.decoder.output)
    return model.eval()


def make_model(bench: Bench, shape: Shape) -> InternVL:
    """A model of a shape, without an engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = make_checkpoint(Path(name), shape=shape, weights=False)
        config = load_config(folder)
        return random_model(config, folder, device=bench.device, dtype=bench.dtype)


@contextlib.contextmanager
def core(bench: Bench, shape: Shape, **settings: Any) -> Iterator[tuple[EngineCore, ModelRunner]]:
    """An engine of a shape, random weights, no prefix cache unless asked for."""
    values = {
        "device": bench.device.type,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "enable_prefix_caching": False,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
    }
    if bench.dry:
        values |= {"max_num_seqs": 4, "num_kv_blocks": 64, "block_size": 16, "threads": 1}
    built = engine.runner.build_model
    engine.runner.build_model = random_model
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = make_checkpoint(Path(folder), shape=shape, weights=False)
            options = EngineSettings(model=str(path), **(values | settings))
            runner = ModelRunner(options)
        found = EngineCore(options, runner, runner.ready()), runner
        try:
            yield found
        finally:
            for one in found:  # the caller's names still hold them; the next one needs the memory
                vars(one).clear()
            gc.collect()
    finally:
        engine.runner.build_model = built


def ask(name: str, prompt: list[int], tokens: int, **sampling: Any) -> EngineRequest:
    """A request for so many tokens."""
    params = SamplingParams(**({"temperature": 0.0} | sampling), max_tokens=tokens)
    return EngineRequest(name, prompt, params)


def shown(
    name: str,
    geometry: Shape | VisionGeometry,
    tiles: int,
    tokens: int,
    seed: int,
    image_token: int = IMAGE_TOKEN,
    question: int = 4,
) -> tuple[EngineRequest, list[bytes]]:
    """A request that shows one picture of so many tiles, noise, with so many tokens of text; and
    its pixels."""
    length = tiles * geometry.tokens_per_tile
    prompt = [seed % 100, *[image_token] * length, *range(1, question)]
    item = VisionItem(b"%d %d" % (seed, tiles), 1, length, tiles, 0)
    pixels = np.random.default_rng(seed).bytes(tiles * 3 * geometry.tile_size**2)
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    return EngineRequest(name, prompt, params, [item]), [pixels]


def decode_seconds(
    bench: Bench, engine_core: EngineCore, rows: int, context: int, steps: int, **sampling: Any
) -> float:
    """Wall time per step in which ``rows`` rows of ``context`` tokens get one more each."""
    for row in range(rows):
        prompt = [(row * 7919 + i) % 100 for i in range(context)]
        # More tokens than all the prompts take steps, so that no row ends before the last begins.
        engine_core.add(ask(f"{row}", prompt, bench.pick(8192, steps + 40), **sampling))
    start(engine_core, rows)
    for _ in range(3):
        engine_core.step()
    bench.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        engine_core.step()
    bench.synchronize()
    took = (time.perf_counter() - began) / steps
    engine_core.abort([f"{row}" for row in range(rows)])
    while engine_core.step() is not None:
        pass
    return took


def start(engine_core: EngineCore, rows: int) -> None:
    """Step until so many rows have a token."""
    started: set[str] = set()
    while len(started) < rows:
        report = engine_core.step()
        assert report is not None
        for output in report.outputs:
            assert output.finish_reason != "error", output.error
            started.add(output.id)
