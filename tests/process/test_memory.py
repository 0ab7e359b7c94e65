"""The largest step that the settings admit is the one that was profiled, in a real process."""

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoints import Shape, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]

# A vocabulary, a context and pictures large enough to be seen beside the interpreter.
SHAPE = Shape(tile_size=112, image_size=112, vocab=150_000, positions=2048)
SETTINGS = {
    "max_num_seqs": 48,
    "max_num_batched_tokens": 2048,
    "max_num_encoder_tiles": 104,
    "encoder_cache_bytes": 1 << 20,
    "request_tile_bytes": 32 << 20,
    "num_kv_blocks": 1200,
    "block_size": 16,
    "step_budget_ms": 0,  # what a step may hold must not depend on how busy the machine is
}
HELD = 32 << 20  # beside what is in use, by the C library


def test_the_worst_traffic_takes_no_more_than_was_profiled(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, shape=SHAPE)
    command = [sys.executable, "-m", "tests.process.worst_traffic", folder, json.dumps(SETTINGS)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert child.returncode == 0, child.stderr.decode()
    took = json.loads(child.stdout)
    assert took["step"] > HELD  # else this test says nothing
    bound = took["step"] + took["cache"] + took["tiles"] + SETTINGS["encoder_cache_bytes"]
    assert took["peak"] < bound + HELD, took
