"""The parts that drive an engine: steps, how they overlap, grammars, caches, requests at once."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import offline
from benchmarks.gpu.harness import Bench, ask, core, decode_seconds, shown, start
from engine.core import EngineCore
from engine.runner import ModelRunner
from model.ops import Ops
from tests.checkpoints import IMAGE_TOKEN
from wire.sampling import Grammar

_CONTEXT = 1024


def _floor(runner: ModelRunner, rows: int, context: int) -> int:
    """Bytes that a step reads: the decoder's layers, its head and the rows' keys and values."""
    model = runner._model
    weights = [*model.decoder.layers.parameters(), *model.decoder.output.parameters()]
    text = model.config.text
    keys = 2 * text.layers * text.kv_heads * text.head_dim * model.dtype.itemsize
    return sum(weight.nbytes for weight in weights) + rows * context * keys


def decode(bench: Bench) -> None:
    """4: the time of a step against what its bytes take at the copy's bandwidth."""
    bandwidth = bench.bandwidth()
    context, steps = bench.pick(_CONTEXT, 8), bench.pick(64, 4)
    marks = {("8B", 1): 1.18, ("8B", 64): 1.15, ("1B", 1): 2.2}
    for name, shape in bench.models.items():
        with bench.case(name), core(bench, shape) as (engine_core, runner):
            if not bench.dry:
                bench.check(f"{name} steps are replayed", runner._graphs is not None)
            for rows in bench.pick((1, 4, 16, 64, 256), (1, 3)):
                took = decode_seconds(bench, engine_core, rows, context, steps)
                label = f"{name} rows={rows}"
                bench.record(f"{label} step", took * 1e3, "ms")
                floor = _floor(runner, rows, context + steps // 2) / bandwidth
                bench.record(f"{label} over floor", took / floor, "x", most=marks.get((name, rows)))


def syncs(bench: Bench) -> None:
    """5: nothing waits for the device but ``finish``; what the device idles between steps."""
    shape = next(iter(bench.models.values()))
    with core(bench, shape) as (engine_core, runner):
        finish, cuda = runner.finish, bench.device.type == "cuda"

        def permitted() -> object:
            mode = torch.cuda.get_sync_debug_mode() if cuda else 0
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
            try:
                return finish()
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode(mode)

        runner.finish = permitted  # type: ignore[assignment, method-assign]
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            rows, context, steps = bench.pick((16, 256, 1000), (2, 8, 4))
            took = decode_seconds(bench, engine_core, rows, context, steps)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
        bench.check("no wait for the device in any step", True)
        runner.finish = finish  # type: ignore[method-assign]
        if runner._graphs is not None:
            graph = runner._graphs.pick(rows)
            assert graph is not None
            with torch.inference_mode():
                alone = bench.seconds(lambda: (graph._forward(), graph._greedy()))
            bench.record("between steps", (took - alone) * 1e6, "us", most=20)


def run_ahead(bench: Bench) -> None:
    """6: two milliseconds more on the host hide behind the device's step."""
    shape = next(iter(bench.models.values()))
    rows, context, steps = bench.pick((16, _CONTEXT, 64), (2, 8, 4))
    for mode in ("on", "off"):
        with core(bench, shape, async_scheduling=mode) as (engine_core, _):
            plain = decode_seconds(bench, engine_core, rows, context, steps)
            with _slower(engine_core, 0.002):
                slow = decode_seconds(bench, engine_core, rows, context, steps)
            most = 1.02 if mode == "on" else None
            bench.record(f"async_scheduling={mode}", slow / plain, "x", most=most)


@contextlib.contextmanager
def _slower(engine_core: EngineCore, seconds: float) -> Iterator[None]:
    plan = engine_core._scheduler.plan

    def slow(*arguments: Any) -> object:
        time.sleep(seconds)
        return plan(*arguments)

    engine_core._scheduler.plan = slow  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        engine_core._scheduler.plan = plan  # type: ignore[method-assign]


def grammar(bench: Bench) -> None:
    """12: what a grammar of every row adds to a step."""
    shape = next(iter(bench.models.values()))
    rows, context, steps = bench.pick((64, 256, 64), (2, 8, 4))
    with core(bench, shape) as (engine_core, runner):
        plain = decode_seconds(bench, engine_core, rows, context, steps)
        held = decode_seconds(
            bench,
            engine_core,
            rows,
            context,
            steps,
            grammar=Grammar("regex", "[a-z ]{900,}"),
            stop_token_ids=runner.ready().eos_token_ids,
        )
        bench.record("64 rows held to a regex", held / plain, "x", most=1.03)


def ladder(bench: Bench) -> None:
    """16: a step without one thing after the other."""
    rungs: dict[str, dict[str, object]] = {
        "all": {},
        "no graphs": {"cuda_graphs": False},
        "no run-ahead": {"async_scheduling": "off"},
        "neither": {"cuda_graphs": False, "async_scheduling": "off"},
        "reference attention": {"cuda_graphs": False, "attention_backend": "sdpa"},
    }
    context, steps = bench.pick(_CONTEXT, 8), bench.pick(32, 4)
    for name, shape in bench.models.items():
        for rung, settings in rungs.items():
            with bench.case(f"{name} {rung}"), core(bench, shape, **settings) as (engine_core, _):
                for rows in bench.pick((1, 64), (1, 2)):
                    took = decode_seconds(bench, engine_core, rows, context, steps)
                    bench.record(f"{name} {rung} rows={rows}", took * 1e3, "ms")
        with (
            bench.case(f"{name} unfused"),
            core(bench, shape, cuda_graphs=False) as (engine_core, runner),
        ):
            runner._model.ops = Ops()
            took = decode_seconds(bench, engine_core, 1, context, steps)
            bench.record(f"{name} no graphs, unfused rows=1", took * 1e3, "ms")


def fp8(bench: Bench) -> None:
    """17, the speed: a prompt and steps in fp8 against the model's own type.

    Then once more with norms and activations rounded by kernels of their own. How near the answers
    are is ``benchmarks/quantization.py``'s, for a checkpoint that was trained.
    """
    kinds = ("none",) * 3 if bench.dry else ("none", "fp8", "fp8 apart")
    length, context, steps = bench.pick((8000, _CONTEXT, 32), (16, 8, 4))
    for name, shape in bench.models.items():
        took: list[list[float]] = []
        for kind in kinds:
            made = contextlib.nullcontext() if kind != "fp8 apart" else _apart()
            with made, core(bench, shape, quantization=kind.split()[0]) as (engine_core, _):
                prompts = [
                    _first_token(bench, engine_core, functools.partial(engine_core.add, request))
                    for request in (ask(f"{i}", [i % 9] * length, 2) for i in range(3))
                ]
                rows = [
                    decode_seconds(bench, engine_core, count, context, steps)
                    for count in bench.pick((1, 64), (1, 2))
                ]
                took.append([min(prompts), *rows])
        labels = (
            f"prompt of {length}",
            *(f"step of {count}" for count in bench.pick((1, 64), (1, 2))),
        )
        for label, before, after, apart in zip(labels, *took, strict=True):
            least = 1.4 if label.startswith("prompt") and name == "8B" else None
            bench.record(f"{name} {label} faster by", before / after, "x", least=least)
            bench.record(f"{name} {label} rounded apart", apart / after, "x")


def _apart() -> contextlib.AbstractContextManager[object]:
    """What is rounded to float8 is read once more for that."""
    from model.ops.triton import TritonOps  # where there is a GPU, there is Triton

    names = ("add_norm_for", "gate_up_for", "linear_gelu_for")
    return mock.patch.multiple(TritonOps, **{name: getattr(Ops, name) for name in names})


def _first_token(bench: Bench, engine_core: EngineCore, add: Callable[[], None]) -> float:
    bench.synchronize()
    began = time.perf_counter()
    add()
    while (report := engine_core.step()) is not None:
        if report.outputs:
            took = time.perf_counter() - began
            while engine_core.step() is not None:
                pass
            return took
    raise AssertionError("no token came")


def caches(bench: Bench) -> None:
    """13: the second question about a picture against a text of the question's length."""
    name, shape = next(iter(bench.models.items()))
    tiles = bench.pick(13, 2)
    with core(bench, shape, enable_prefix_caching=True) as (engine_core, _):
        seen, texts, fresh = [], [], []
        for seed in range(bench.pick(9, 1)):
            for times in (fresh, seen):
                request, pixels = shown(f"{name}{seed}{len(seen)}", shape, tiles, 2, seed)
                times.append(
                    _first_token(bench, engine_core, lambda: engine_core.add(request, pixels))  # noqa: B023
                )
            text = ask(f"text{seed}", [seed, 90, 91, 92, 93], 2)
            texts.append(_first_token(bench, engine_core, lambda: engine_core.add(text)))  # noqa: B023
        first, again, text_only = (statistics.median(times) for times in (fresh, seen, texts))
        bench.record(f"{name} tiles={tiles} first time", first * 1e3, "ms")
        bench.record(f"{name} again over text", again / text_only, "x", most=1.2)


def under_pictures(bench: Bench) -> None:
    """14: the time between tokens of rows that generate while pictures arrive."""
    for name, shape in bench.models.items():
        rows, arrivals, every = bench.pick((32, 20, 12), (2, 2, 2))
        with bench.case(name), core(bench, shape) as (engine_core, _):
            for row in range(rows):
                engine_core.add(ask(f"{row}", [row] * bench.pick(512, 8), bench.pick(8192, 60)))
            start(engine_core, rows)
            tiles = bench.pick(13, 2)
            pictures = [shown(f"p{number}", shape, tiles, 4, number) for number in range(arrivals)]
            gaps, last = [], time.perf_counter()
            for step in range(arrivals * every):
                if step % every == every - 1:
                    engine_core.add(*pictures.pop())
                report = engine_core.step()
                if report and any(output.id == "0" for output in report.outputs):
                    now = time.perf_counter()
                    gaps.append(now - last)
                    last = now
            tail = sorted(gaps)[max(0, int(len(gaps) * 0.99) - 1)]
            bench.record(f"{name} p50 between tokens", statistics.median(gaps) * 1e3, "ms")
            bench.record(
                f"{name} p99 between tokens", tail * 1e3, "ms", most=65 if name == "8B" else None
            )
            engine_core.abort([f"{row}" for row in range(rows)])
            while engine_core.step() is not None:
                pass


def end_to_end(bench: Bench) -> None:
    """15, our side: requests per second through the engine, without HTTP and decoding."""
    cases = bench.pick(offline.CASES, {"text": (0, 4), "2 tiles": (2, 4)})
    for name, shape in bench.models.items():
        with bench.case(name), core(bench, shape) as (engine_core, _):
            lengths = bench.pick((offline.TEXT, offline.QUESTION), (8, 4))
            run = offline.requests_of(engine_core, shape, IMAGE_TOKEN, *lengths)
            found = offline.measure(run, cases, bench.pick((1, 16, 64), (1, 3)))
            for case, rate in found.items():
                bench.record(f"{name} {case}", rate, "requests/s")
