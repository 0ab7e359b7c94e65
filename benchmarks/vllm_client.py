"""Cases of ``benchmarks.cases`` sent by ``vllm bench serve``: a client that we did not write."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Self

from benchmarks.cases import our_client
from server.bench.client import Case

# Runs under a Python that has vLLM, and stays: the import takes longer than most cases. A line of
# JSON in, the words of a command line; a line of JSON out.
_PROGRAM = """
import asyncio, contextlib, io, json, sys
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):
        result = asyncio.run(main_async(parser.parse_args(json.loads(line))))
    print(json.dumps(result), flush=True)
"""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Of all that is vLLM's: it asks nobody outside for anything."""
_NAMES = {
    "completed": "requests",
    "total_input_tokens": "prompt_tokens",
    "total_output_tokens": "output_tokens",
    "request_throughput": "requests_per_s",
    "output_throughput": "tokens_per_s",
    "p50_ttft_ms": "ttft_p50_ms",
    "p50_tpot_ms": "tpot_p50_ms",
    "p50_itl_ms": "itl_p50_ms",
    "p99_itl_ms": "itl_p99_ms",
}


class VllmProgram:
    """The process that sends; ``python`` is one that can import vLLM."""

    def __init__(self, python: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT,
            text=True,
        )

    def run(self, words: list[str]) -> dict[str, Any]:
        """What ``vllm bench serve`` finds when its command line is ``words``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("vLLM's client ended")
        found: dict[str, Any] = json.loads(line)
        if found["failed"] or not found["completed"]:
            raise RuntimeError(str([error for error in found["errors"] if error][:1])[:300])
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class VllmClient:
    """As our own; a case it has no data set for, the same picture again, is sent by our own.

    ``tokenizer`` is the checkpoint's folder: prompts are random tokens.
    """

    def __init__(self, url: str, program: VllmProgram, tokenizer: Path) -> None:
        self.own, self.program, self.tokenizer = our_client(url), program, tokenizer

    def measure(self, case: Case, seed: int) -> dict[str, float | None]:
        """As our own; but the first of requests that share a prefix is measured too."""
        if case.again:
            return self.own.measure(case, seed)
        found = self.program.run(self._words(case, seed))
        return {ours: float(found[theirs]) for theirs, ours in _NAMES.items()}

    def _words(self, case: Case, seed: int) -> list[str]:
        options: dict[str, object] = {
            "backend": "openai-chat",
            "endpoint": "/v1/chat/completions",
            "base-url": self.own.url,
            "model": self.own.model,
            "tokenizer": self.tokenizer,
            "temperature": 0,
            "seed": seed,
            "ready-check-timeout-sec": 0,
            "percentile-metrics": "ttft,tpot,itl",
            "metric-percentiles": "50,99",
            "num-prompts": case.requests + case.primed,
            "max-concurrency": case.concurrency,
            "random-input-len": case.input_tokens,
            "random-output-len": case.output_tokens,
            "random-prefix-len": case.shared,
            "random-range-ratio": 0,
            "dataset-name": "random",
        }
        if case.picture:
            options |= {
                "dataset-name": "random-mm",
                "random-mm-base-items-per-request": 1,
                "random-mm-num-mm-items-range-ratio": 0,
                "random-mm-limit-mm-per-prompt": '{"image": 1, "video": 0}',
                "random-mm-bucket-config": f"{{({case.picture}, {case.picture}, 1): 1.0}}",
            }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, "--disable-tqdm", "--ignore-eos"]
