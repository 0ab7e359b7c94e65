"""Everything that awaits a GPU, in parts that run on their own; prints a table, writes JSON.

    python -m benchmarks.gpu --out result.json                all parts
    python -m benchmarks.gpu checks ceilings --out ...        some
    python -m benchmarks.gpu --dry-run --out ...              tiny shapes, on any machine

A part that fails is noted and the next one runs. Parts that would begin later than ``--seconds``
after the start are left out, and named, so that a visit of limited time brings the rest home. The
numbers in the parts' descriptions are those of docs/gpu-checklist.md, with the marks.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, images, kernels, ours, steps
from benchmarks.gpu.harness import Bench

PARTS: dict[str, Callable[[Bench], None]] = {
    "backends": checks.backends,
    "model": checks.model,
    "tokens": checks.tokens,
    "our_kernels": ours.tests,
    "ceilings": kernels.ceilings,
    "decode_attention": kernels.decode_attention,
    "prefill_attention": kernels.prefill_attention,
    "encoder": kernels.encoder,
    "sampler": kernels.sampler,
    "resize": ours.resize,
    "images": images.images,
    "decode": steps.decode,
    "syncs": steps.syncs,
    "run_ahead": steps.run_ahead,
    "grammar": steps.grammar,
    "caches": steps.caches,
    "under_pictures": steps.under_pictures,
    "end_to_end": steps.end_to_end,
    "fp8": steps.fp8,
    "ladder": steps.ladder,
    "experts": kernels.experts,
}
"""In the order of their worth, should the time not do for all."""
MISSING = {
    "11 front end at 40,000 tokens/s": "needs no GPU",
    "15 vLLM as a peer": "benchmarks.gpu.beside",
    "tensor parallelism": "not written",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 if something was wrong or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, no judgement")
    parser.add_argument("--seconds", type=float, default=540, help="when no part begins any more")
    given = parser.parse_args(arguments)
    usable = torch.cuda.is_available()
    if not usable and not given.dry_run:
        parser.error("torch finds no CUDA device; --dry-run goes through everything without")
    bench = Bench(torch.device("cuda" if usable and not given.dry_run else "cpu"), given.dry_run)
    began = time.monotonic()
    for name in given.parts or PARTS:
        bench.part = name
        if time.monotonic() - began > given.seconds:
            bench.skip(name, "out of time")
            continue
        part_began = time.monotonic()
        with bench.case(name):
            PARTS[name](bench)
        print(f"{name}: {time.monotonic() - part_began:.1f} s", flush=True)
        _write(given.out, bench)  # after each, should the next one take the machine with it
    _write(given.out, bench)
    print(table(bench.results))
    return int(any("error" in entry or entry.get("passed") is False for entry in bench.results))


def _write(file: Path, bench: Bench) -> None:
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor()
    found = {
        "device": device,
        "dry_run": bench.dry,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": bench.results,
        "missing": MISSING,
    }
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| part | case | value | mark | |", "|---|---|---|---|---|"]
    for entry in results:
        value = f"{entry['value']:.4g} {entry['unit']}" if "value" in entry else ""
        verdict = {True: "ok", False: "**no**", None: ""}[entry.get("passed")]
        said = entry.get("error") or entry.get("skipped") or verdict
        lines.append(
            f"| {entry['part']} | {entry['case']} | {value} | {entry.get('mark', '')} | {said} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
