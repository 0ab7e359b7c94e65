"""The parts that need no engine: ceilings, attention, the sampler, the encoder."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.harness import Bench, make_model
from engine.graphs import TileGraphs, capture_on
from engine.sampling.base import SampleRow
from engine.sampling.sampler import sample
from model.attention import BACKENDS
from model.attention.base import AttentionBackend, AttentionBatch
from model.kv_cache import KVCache
from model.layers import Linear
from model.mlp import Experts
from model.ops import Ops, choose
from model.quantize import PRODUCTS, Fp8Linear, quantize_whole, quantizer, to_fp8
from model.schema import ExpertsConfig, TextConfig
from tests.checkpoints import INTERNVL3, Shape
from tests.parity.test_attention import config
from wire.sampling import SamplingParams


def ceilings(bench: Bench) -> None:
    """1: copy bandwidth, and matrix products of the shapes of 8B, in bf16 and fp8."""
    bench.record("copy", bench.bandwidth() / 1e12, "TB/s", least=4.3 * 0.95)
    shapes = bench.pick(
        {"qkv": (4608, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}, {"qkv": (64, 32)}
    )
    for rows in bench.pick((1, 16, 64, 256, 2048, 8192), (1, 4)):
        for name, (outputs, inputs) in shapes.items():
            x = torch.randn(rows, inputs, device=bench.device, dtype=bench.dtype)
            weight = torch.randn(outputs, inputs, device=bench.device, dtype=bench.dtype)
            took = bench.seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
            mark = 790 * 0.95 if rows == 8192 and name == "gate_up" else None
            rate = 2 * rows * outputs * inputs / took / 1e12
            bench.record(f"{name} M={rows} bf16", rate, "TFLOP/s", least=mark)
            with bench.case(f"{name} M={rows} fp8"):
                layer = Linear(inputs, outputs, bias=False)
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                held = Fp8Linear(layer, PRODUCTS[0])
                (ready, scale), flops = to_fp8(x), 2 * rows * outputs * inputs
                for label, call in (
                    ("fp8", lambda: PRODUCTS[0](ready, held.weight, scale, held.scale, None)),  # noqa: B023
                    ("fp8 with quantising", lambda: held(x)),  # noqa: B023
                ):
                    rate = flops / bench.seconds(call) / 1e12
                    bench.record(f"{name} M={rows} {label}", rate, "TFLOP/s")


def _batch(
    bench: Bench, rows: list[tuple[int, int]], heads: tuple[int, int], dim: int, size: int
) -> tuple[TextConfig, KVCache, AttentionBatch, tuple[Tensor, Tensor, Tensor]]:
    """Rows of (new tokens, context) in blocks of their own, and queries, keys and values."""
    text = dataclasses.replace(config(*heads), head_dim=dim)
    width = max(-(-context // size) for _, context in rows)
    device = bench.device
    kv = KVCache(text, blocks=width * len(rows), block_size=size, device=device, dtype=bench.dtype)
    kv.layers[0].normal_()
    order = np.random.default_rng(0).permutation(width * len(rows)).reshape(len(rows), width)
    slots = [
        order[row, p // size] * size + p % size
        for row, (new, context) in enumerate(rows)
        for p in range(context - new, context)
    ]
    queries, contexts = zip(*rows, strict=True)
    batch = AttentionBatch(
        query_starts=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32, device=device),
        context_lengths=torch.tensor(contexts, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, device=device),
        block_tables=torch.from_numpy(order).to(device),
        queries=queries,
        contexts=contexts,
    )
    query, key, value = (
        torch.randn(sum(queries), count, dim, device=device, dtype=bench.dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    return text, kv, batch, (query, key, value)


def _backend(bench: Bench, name: str, text: TextConfig) -> AttentionBackend | str:
    """A backend, or why it cannot be used here."""
    backend = BACKENDS[name](text)
    return backend.supports(bench.device, bench.dtype, 64) or backend


def decode_attention(bench: Bench) -> None:
    """2: rows of one token; the share of the copy bandwidth at which the cache is read."""
    bandwidth = bench.bandwidth()
    group = {5: (40, 8), 6: (12, 2), 7: (28, 4), 8: (64, 8)}
    cases = [(b, c, 7, 64) for b in (1, 16, 64, 256) for c in (1024, 4096, 16384)]
    cases += [(64, 4096, g, 64) for g in (5, 6, 8)] + [(64, 4096, 7, s) for s in (16, 256)]
    for rows, context, heads, size in bench.pick(cases, [(2, 40, 7, 16)]):
        keys = 2 * rows * context * group[heads][1] * 128 * bench.dtype.itemsize
        if keys > 60e9:
            continue
        label = f"rows={rows} context={context} group={heads} block={size}"
        text, kv, batch, (query, key, value) = _batch(
            bench, [(1, context)] * rows, group[heads], bench.pick(128, 16), size
        )
        cache, times = kv.layers[0], {}
        for name in BACKENDS:
            with bench.case(f"{name} {label}"):
                backend = _backend(bench, name, text)
                if isinstance(backend, str):
                    bench.skip(f"{name} {label}", backend)
                    continue
                plan = backend.plan(batch, kv)
                took = bench.seconds(lambda: backend.attend(query, key, value, cache, plan))  # noqa: B023
                times[name] = took
                least = 0.85 if rows >= 16 and backend.graph_safe and context >= 4096 else None
                bench.record(f"{name} {label}", keys / took / bandwidth, "of copy", least=least)
        with bench.case(f"FA3's own {label}"):
            call = _fa3_decode(batch, cache)
            if call is None or "triton" not in times:
                bench.skip(f"FA3's own {label}", "FA3 or Triton is missing")
                continue
            own = bench.seconds(lambda: call(query))  # noqa: B023
            bench.record(f"FA3's own {label}", keys / own / bandwidth, "of copy")
            bench.record(f"triton against it {label}", own / times["triton"], "x", least=0.95)


def _fa3_decode(batch: AttentionBatch, cache: Tensor) -> Callable[[Tensor], Tensor] | None:
    """FlashAttention-3's decode over the same blocks, if it is installed."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return None
    function = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    # It wants [blocks, block_size, kv_heads, head_dim], of which only the last must be dense.
    keys, values = cache.transpose(2, 3).unbind(1)
    tables = batch.block_tables.int()
    return lambda query: function(
        query[:, None],
        keys,
        values,
        cache_seqlens=batch.context_lengths,
        page_table=tables,
        causal=True,
    )


def prefill_attention(bench: Bench) -> None:
    """3: one row of many new tokens, with and without older ones to gather."""
    for length in bench.pick((1024, 3400, 16384, 32768), (40,)):
        for new in (length, length // 4):
            heads, dim = (28, 4), bench.pick(128, 16)
            text, kv, batch, parts = _batch(bench, [(new, length)], heads, dim, 64)
            pairs = new * (length - new) + new * (new + 1) / 2
            for name in BACKENDS:
                label = f"{name} {new} of {length}"
                with bench.case(label):
                    backend = _backend(bench, name, text)
                    if isinstance(backend, str):
                        bench.skip(label, backend)
                        continue
                    plan, cache = backend.plan(batch, kv), kv.layers[0]
                    took = bench.seconds(lambda: backend.attend(*parts, cache, plan), 5)  # noqa: B023
                    bench.record(label, 4 * pairs * heads[0] * dim / took / 1e12, "TFLOP/s")


def sampler(bench: Bench) -> None:
    """7: one draw of 256 rows over 151,674 tokens."""
    rows, vocab = bench.pick((256, 151_674), (4, 512))
    logits = torch.randn(rows, vocab, device=bench.device) * 3
    for name, params, most in (
        ("greedy", SamplingParams(temperature=0.0), 0.10),
        ("temperature", SamplingParams(temperature=0.7), None),
        ("top_p", SamplingParams(temperature=0.7, top_p=0.9), 0.25),
        ("top_k", SamplingParams(temperature=0.7, top_k=50), None),
    ):
        with bench.case(name):
            asked = [SampleRow(params, np.arange(9), np.arange(9)) for _ in range(rows)]
            took = bench.seconds(lambda: sample(logits, asked))  # noqa: B023
            bench.record(name, took * 1e3, "ms", most=most)


def encoder(bench: Bench) -> None:
    """8: milliseconds per tile, unfused, fused and replayed; then with layers in float8."""
    shape = bench.pick(dataclasses.replace(INTERNVL3["8B"], layers=1), Shape())
    model = make_model(bench, shape)
    fused, side = model.ops, model.config.geometry.tile_size
    for count in bench.pick((1, 2, 8, 13, 32), (1, 2)):
        tiles = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=bench.device)
        for name, ops in (("torch", Ops()), (fused.name, fused)):
            with bench.case(f"{name} tiles={count}"), torch.inference_mode():
                model.ops = ops
                took = bench.seconds(lambda: model.encode_tiles(tiles), 5)  # noqa: B023
                bench.record(f"{name} tiles={count}", took * 1e3 / count, "ms/tile")
        model.ops = fused
        capture = capture_on(bench.device)
        if capture is not None:
            with bench.case(f"graph tiles={count}"), torch.inference_mode():
                graphs = TileGraphs(model, [count], capture)
                took = bench.seconds(lambda: graphs(tiles), 5)  # noqa: B023
                most = {1: 2.0, 32: 1.55}.get(count)
                bench.record(f"graph tiles={count}", took * 1e3 / count, "ms/tile", most=most)
    with bench.case("fp8"), torch.inference_mode():
        pictures = (model.vision.layers, model.projector)
        quantized = quantizer(model.decoder.layers, "fp8-all", bench.device, pictures)
        assert quantized is not None
        for part in pictures:
            quantize_whole(part, quantized)
        for count in bench.pick((1, 13, 32), (1,)):
            tiles = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=bench.device)
            call = functools.partial(model.encode_tiles, tiles)
            if (capture := capture_on(bench.device)) is not None:
                call = functools.partial(TileGraphs(model, [count], capture), tiles)
            bench.record(f"fp8 tiles={count}", bench.seconds(call, 5) * 1e3 / count, "ms/tile")


@torch.inference_mode()
def experts(bench: Bench) -> None:
    """A layer's mixture of InternVL3.5-30B-A3B: its experts one by one, together, replayed."""
    count, chosen, hidden, inner = bench.pick((128, 8, 2048, 768), (4, 2, 32, 16))
    with torch.device("meta"):
        layer = Experts(hidden, ExpertsConfig(count, chosen, inner, True, frozenset()))
    layer = layer.to(bench.dtype).to_empty(device=bench.device)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02)
    together, bandwidth = choose(bench.device, bench.dtype), bench.bandwidth()
    together.prepare(list(layer.modules()), None)
    for rows in bench.pick((1, 16, 64, 256, 8192), (1, 3)):
        x = torch.randn(rows, hidden, device=bench.device, dtype=bench.dtype)
        least = min(count, rows * chosen) * 3 * hidden * inner * x.itemsize / bandwidth
        calls = {ops.name: functools.partial(layer, x, ops) for ops in (Ops(), together)}
        capture = capture_on(bench.device)
        if capture is not None and not together.experts_wait:
            with bench.case(f"graph rows={rows}"):
                calls["graph"] = capture(calls[together.name])
        for name, call in calls.items():
            with bench.case(f"{name} rows={rows}"):
                took = bench.seconds(call, 5)
                bench.record(f"{name} rows={rows}", took * 1e3, "ms")
                bench.record(f"{name} rows={rows} over reading weights", took / least, "x")
